"""Data sets of the evaluations, from made folders: layouts, order, labels, and messages."""

from __future__ import annotations

import argparse
import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from PIL import Image

from patchreg.datasets.copydays import BLOCKS, CopydaysDataset
from patchreg.datasets.davis import DavisDataset, palette, save_mask, scale_frame
from patchreg.datasets.image_list import UnlabelledImageDataset
from patchreg.datasets.photo_copies import EDITS, PhotoCopiesDataset
from patchreg.datasets.prepare import photos
from patchreg.datasets.revisited import RevisitedDataset
from patchreg.runner.run import evaluate
from patchreg.transforms.resize import ThumbnailResize
from patchreg.utils.errors import ConfigError, DataError, MissingFileError, UserError


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope("patchreg")


def picture(path: Path, height: int = 12, width: int = 16, seed: int = 0) -> None:
    """Write a smooth picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)


def copydays(root: Path) -> None:
    """A Copydays with three originals."""
    for block in BLOCKS:
        if block == "strong":
            continue
        for number in range(3):
            picture(root / block / f"20{number}0{'0' * 2}.jpg", seed=number)
    for name in ("200001.jpg", "200002.JPG", "202003.jpg"):
        picture(root / "strong" / name)


def test_copydays_matches_copies_with_originals(tmp_path: Path) -> None:
    copydays(tmp_path)
    copies = CopydaysDataset(str(tmp_path))
    meta = copies.metainfo
    assert len(copies) == 20 * 3
    assert meta["block_names"][:4] == ["original", "strong", "jpegqual_3", "jpegqual_5"]
    assert meta["block_of"] == np.repeat(np.arange(20), 3).tolist()
    assert copies.get_gt_labels()[:9].tolist() == [0, 1, 2, 0, 0, 2, 0, 1, 2]
    originals = CopydaysDataset(str(tmp_path), blocks=["original"])
    assert originals.get_gt_labels().tolist() == [0, 1, 2]
    assert originals[1]["img_path"].endswith("original/201000.jpg")


def test_copydays_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"Expected .*jpegqual/\{3,5,8"):
        CopydaysDataset(str(tmp_path))
    copydays(tmp_path)
    (tmp_path / "crops/50/200000.jpg").unlink()
    with pytest.raises(DataError, match="block 'crops/50' has 2 images, but there are 3"):
        CopydaysDataset(str(tmp_path))
    picture(tmp_path / "strong/999900.jpg")
    with pytest.raises(DataError, match="no original that begins with '9999'"):
        CopydaysDataset(str(tmp_path), blocks=["strong"])
    with pytest.raises(ConfigError, match="has no block 'jpegqual/4'"):
        CopydaysDataset(str(tmp_path), blocks=["jpegqual/4"])


def revisited(root: Path, gnd: Any = None) -> Path:
    """A revisited Oxford with two queries and four images."""
    names = [f"place_{number:06d}" for number in range(4)]
    queries = ["query_a", "query_b"]
    for number, name in enumerate((*names, *queries)):
        picture(root / "roxford5k/jpg" / f"{name}.jpg", 20, 30, seed=number)
    truth = [
        dict(easy=[0], hard=np.array([2]), junk=[3], bbx=[4.5, 2.0, 19.9, 11.0]),
        dict(easy=[], hard=[1], junk=[], bbx=[0, 0, 30, 20]),
    ]
    content = dict(imlist=names, qimlist=queries, gnd=truth if gnd is None else gnd)
    path = root / "roxford5k/gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps(content))
    return path


def test_revisited_reads_lists_truth_and_boxes(tmp_path: Path) -> None:
    revisited(tmp_path)
    query = RevisitedDataset(str(tmp_path), "roxford5k", "query")
    assert len(query) == 2
    assert query.metainfo["ground_truth"] == [
        dict(easy=[0], hard=[2], junk=[3]),
        dict(easy=[], hard=[1], junk=[]),
    ]
    assert query[0]["img_path"].endswith("jpg/query_a.jpg")
    assert "img" not in query[0]
    database = RevisitedDataset(str(tmp_path), "roxford5k", "database")
    assert len(database) == 4
    assert "ground_truth" not in database.metainfo
    cropped = RevisitedDataset(str(tmp_path), "roxford5k", "query", crop_query=True)
    whole = np.array(Image.open(tmp_path / "roxford5k/jpg/query_a.jpg"))
    assert np.array_equal(cropped[0]["img"], whole[2:11, 4:20])


def test_revisited_refuses_boxes_and_truth_that_do_not_fit(tmp_path: Path) -> None:
    good = dict(easy=[0], hard=[], junk=[], bbx=[0, 0, 30, 20])
    for box in ([5, 3, 5, 20], [1, 2], [9, 3, 2, 20]):
        revisited(tmp_path, [good, dict(good, bbx=box)])
        RevisitedDataset(str(tmp_path), "roxford5k", "query")  # Boxes that nobody uses.
        with pytest.raises(DataError, match="the box of 'query_b' is"):
            RevisitedDataset(str(tmp_path), "roxford5k", "query", crop_query=True)
    revisited(tmp_path, [good])
    with pytest.raises(DataError, match="2 queries in qimlist, but 1 in gnd"):
        RevisitedDataset(str(tmp_path), "roxford5k", "query")
    # A box that leaves the image is filled up with black, as Pillow does.
    revisited(tmp_path, [good, dict(good, bbx=[-5, 3, 20, 20])])
    image = RevisitedDataset(str(tmp_path), "roxford5k", "query", crop_query=True)[1]["img"]
    assert image.shape == (17, 25, 3)
    assert image[:, :5].max() == 0


def test_revisited_refuses_pickles_that_hold_code(tmp_path: Path) -> None:
    path = revisited(tmp_path)
    marker = tmp_path / "was_run"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    with pytest.raises(DataError, match=r"refers to os\.system"):
        RevisitedDataset(str(tmp_path), "roxford5k")
    assert not marker.exists()
    path.write_bytes(pickle.dumps(dict(imlist=[])))
    with pytest.raises(DataError, match="no ground truth of the revisited benchmark"):
        RevisitedDataset(str(tmp_path), "roxford5k")
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(DataError, match="is not loaded"):
        RevisitedDataset(str(tmp_path), "roxford5k")


def test_revisited_shows_its_layout(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="gnd_rparis6k.pkl' does not exist. Expected"):
        RevisitedDataset(str(tmp_path), "rparis6k")
    revisited(tmp_path)
    (tmp_path / "roxford5k/jpg/place_000002.jpg").unlink()
    with pytest.raises(MissingFileError, match="'jpg/place_000002.jpg' does not exist"):
        RevisitedDataset(str(tmp_path), "roxford5k")
    with pytest.raises(ConfigError, match="name='oxford' is unknown"):
        RevisitedDataset(str(tmp_path), "oxford")


def davis(root: Path, frames: int = 4) -> None:
    """A DAVIS with one sequence in which a square moves."""
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("bear\n")
    for number in range(frames):
        mask = np.zeros((60, 80), dtype=np.uint8)
        mask[20:40, 10 + 8 * number : 34 + 8 * number] = 1
        save_mask(root / f"Annotations/480p/bear/{number:05d}.png", mask)
        pixels = np.where(mask[..., None] == 1, (230, 40, 40), (20, 90, 160)).astype(np.uint8)
        path = root / f"JPEGImages/480p/bear/{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=95)


def test_davis_sequences(tmp_path: Path) -> None:
    davis(tmp_path)
    dataset = DavisDataset(str(tmp_path))
    sequence = dataset[0]
    assert (len(dataset), sequence.name, len(sequence)) == (1, "bear", 4)
    assert sequence.frame(0).shape == (480, 640, 3)
    assert sequence.frame(0)[240, 160].tolist() == pytest.approx([230, 40, 40], abs=6)
    assert sequence.mask(3)[30, 40] == 1
    assert sequence.mask(3).shape == (60, 80)
    (tmp_path / "Annotations/480p/bear/00003.png").unlink()
    with pytest.raises(DataError, match="'bear' has 4 frames and 3 masks"):
        DavisDataset(str(tmp_path))
    with pytest.raises(MissingFileError, match="Expected the layout of DAVIS-2017-trainval-480p"):
        DavisDataset(str(tmp_path), split="test-dev")


def test_frames_are_scaled_by_their_shorter_side() -> None:
    sizes = [
        scale_frame(np.zeros((*size, 3), dtype=np.uint8)).shape[:2]
        for size in ((480, 854), (854, 480), (60, 108), (100, 100))
    ]
    assert sizes == [(480, 832), (832, 480), (480, 832), (480, 480)]


def test_palette_is_that_of_pascal_voc(tmp_path: Path) -> None:
    colours = np.frombuffer(palette(), dtype=np.uint8).reshape(256, 3)
    expected = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert [tuple(colour) for colour in colours[:5].tolist()] == expected
    assert colours[8].tolist() == [64, 0, 0]
    assert colours[255].tolist() == [224, 224, 192]


def test_davis_evaluation_follows_a_square(tmp_path: Path, project_root: Path) -> None:
    davis(tmp_path / "data")
    config = tmp_path / "davis.py"
    text = (project_root / "configs/pwself/davis.py").read_text()
    text = text.replace(
        '"../_base_/runtime.py"', repr(str(project_root / "configs/_base_/runtime.py"))
    )
    text = text.replace('arch="small"', "arch=dict(embed_dims=12, depth=1, num_heads=2)")
    text = text.replace('data_root="data/davis2017"', f"data_root={str(tmp_path / 'data')!r}")
    config.write_text(text)
    metrics = evaluate(str(config), work_dir=str(tmp_path / "run"), seed=0)
    masks = sorted((tmp_path / "run/masks/bear").glob("*.png"))
    assert [item.name for item in masks] == [f"{number:05d}.png" for number in range(4)]
    first = Image.open(masks[0])
    assert first.mode == "P"
    assert np.array_equal(np.array(first), DavisDataset(str(tmp_path / "data"))[0].mask(0))
    # Colours alone tell the square from the rest, also with random weights.
    assert metrics["davis/J_mean"] > 60
    assert metrics["davis/J&F"] == pytest.approx(
        (metrics["davis/J_mean"] + metrics["davis/F_mean"]) / 2
    )


def test_unlabelled_images_in_any_folder(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a.jpg", "b/c/1.jpg"):
        picture(tmp_path / name)
    dataset = UnlabelledImageDataset(str(tmp_path))
    assert [dataset[n]["img_path"].split("/")[-1] for n in range(3)] == ["a.jpg", "2.PNG", "1.jpg"]
    assert dataset.get_gt_labels().tolist() == [0, 1, 2]
    with pytest.raises(MissingFileError, match="expected images in it or below it"):
        UnlabelledImageDataset(str(tmp_path / "none"))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """Six photos and two hosts."""
    for number in range(6):
        picture(tmp_path / "photos" / f"s{number}.jpg", 120, 120, seed=number)
    for number in range(2):
        picture(tmp_path / "hosts" / f"h{number}.jpg", 360, 480, seed=100 + number)
    return str(tmp_path / "photos"), str(tmp_path / "hosts")


def test_copies_are_seeded_by_photo_and_edit(folders: tuple[str, str]) -> None:
    first = PhotoCopiesDataset(folders[0], "query", folders[1], count=4)
    labels = first.get_gt_labels()
    assert len(first) == 5 * 4
    assert labels[:4].tolist() == labels[4:8].tolist() == sorted(set(labels.tolist()))
    assert first.metainfo["block_of"] == np.repeat(np.arange(5), 4).tolist()
    again = PhotoCopiesDataset(folders[0], "query", folders[1], count=4)
    for row in range(20):
        assert np.array_equal(first[row]["img"], again[row]["img"])
        assert first[row]["img_path"].endswith(f"s{labels[row]}.jpg")
    # A copy does not depend on which other edits and photos there are.
    name = "paste_jpeg"
    alone = PhotoCopiesDataset(folders[0], "query", folders[1], edits=[name], count=6)
    place = list(EDITS).index(name) * 4
    assert np.array_equal(alone[int(labels[0])]["img"], first[place]["img"])
    other = PhotoCopiesDataset(folders[0], "query", folders[1], count=6, seed=1)
    assert not np.array_equal(other[0]["img"], alone[0]["img"])
    database = PhotoCopiesDataset(folders[0])
    assert database.get_gt_labels().tolist() == list(range(6))
    assert "img" not in database[0]


def test_edits_do_what_their_names_say(folders: tuple[str, str]) -> None:
    copies = PhotoCopiesDataset(folders[0], "query", folders[1], count=6)
    shown = {name: copies[6 * number]["img"] for number, name in enumerate(EDITS)}
    assert shown["crop_jpeg"].shape == (120, 120, 3)
    grey = shown["rotate_crop_grey"]
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (grey[..., 0] == grey[..., 2]).all()
    for name in ("paste_jpeg", "crop_mirror_paste"):
        assert shown[name].shape == (240, 240, 3)
    photo = np.array(Image.open(copies[0]["img_path"])).astype(float)
    blurred = shown["mirror_blur_recolour"].astype(float)
    mirrored = np.corrcoef(blurred.mean(2).ravel(), photo[:, ::-1].mean(2).ravel())[0, 1]
    assert mirrored > 0.8


def test_copies_say_what_is_missing(folders: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"tools/prepare_data\.py open_images"):
        PhotoCopiesDataset(str(tmp_path / "none"))
    with pytest.raises(MissingFileError, match=r"tools/prepare_data\.py scratch_backgrounds"):
        PhotoCopiesDataset(folders[0], "query", count=1)
    with pytest.raises(DataError, match="count=7 is more than the 6 photos"):
        PhotoCopiesDataset(folders[0], "query", folders[1], count=7)
    with pytest.raises(ConfigError, match="expected some of"):
        PhotoCopiesDataset(folders[0], edits=["wave"])


def test_copy_detection_runs_from_the_config(
    folders: tuple[str, str], tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project_root)
    query = dict(data_root=folders[0], hosts_root=folders[1], count=5)
    options: dict[str, Any] = {"test_cfg.cache": None}
    for start in ("test_dataloader", "test_cfg.bank_dataloader"):
        options |= {f"{start}.dataset.{key}": value for key, value in query.items()}
    metrics = evaluate(
        "configs/pwself/photo_copies_pixels.py", work_dir=str(tmp_path / "run"), options=options
    )
    assert set(metrics) == {"copies/mAP", "copies/R@1"} | {f"copies/{name}_mAP" for name in EDITS}
    parts = [metrics[f"copies/{name}_mAP"] for name in EDITS]
    assert metrics["copies/mAP"] == pytest.approx(sum(parts) / 5)
    assert metrics["copies/mAP"] > 25


def test_thumbnails_only_shrink() -> None:
    resize = ThumbnailResize(20)
    image = np.zeros((30, 60, 3), dtype=np.uint8)
    assert resize(dict(img=image))["img_shape"] == (10, 20)
    assert resize(dict(img=image[:5, :9]))["img_shape"] == (5, 9)
    with pytest.raises(ConfigError, match="size=0"):
        ThumbnailResize(0)


def test_the_evaluation_crop_is_torchvisions(
    project_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision", reason="pip install torchvision")
    from torchvision.transforms import functional

    from patchreg.runner.build import load_config

    monkeypatch.chdir(project_root)
    steps = load_config("configs/pwself/knn.py").test_dataloader.dataset.pipeline
    pipeline = Compose([dict(step) for step in steps])
    for size in ((301, 227), (150, 231), (256, 256)):
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        found = pipeline(dict(img=pixels))["inputs"]
        image = functional.resize(
            Image.fromarray(pixels), 256, functional.InterpolationMode.BICUBIC
        )
        expected = functional.pil_to_tensor(functional.center_crop(image, 224))
        assert torch.equal(found, expected)


def debian_package(files: dict[str, bytes]) -> bytes:
    """A package that holds some files, and another member before them."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    members = [(b"debian-binary", b"2.0\n1"), (b"data.tar.xz", data.getvalue())]
    packed = b"!<arch>\n"
    for name, content in members:
        header = b"%-16s%-12s%-6s%-6s%-8s%-10d`\n" % (
            name,
            b"0",
            b"0",
            b"0",
            b"100644",
            len(content),
        )
        packed += header + content + b"\n" * (len(content) % 2)
    return packed


def test_debian_packages_are_read_without_their_tools() -> None:
    files = {"usr/share/a.jpg": b"photo", "usr/share/doc/copyright": b"terms" * 100}
    found = dict(photos.debian_files(debian_package(files)))
    assert found == {f"./{name}": content for name, content in files.items()}


def test_folders_are_made_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two() -> Iterator[tuple[str, bytes]]:
        yield "a/1.jpg", b"1"
        yield "b/2.jpg", b"2"

    def broken() -> Iterator[tuple[str, bytes]]:
        yield "a/1.jpg", b"1"
        raise photos.SourceError("no network")

    monkeypatch.setitem(photos.COUNTS, "grocery", 2)
    target = tmp_path / "data/grocery"
    with pytest.raises(UserError, match="grocery could not be fetched: no network"):
        photos.prepare_folder("grocery", target, broken)
    assert not list((tmp_path / "data").iterdir())
    assert "2 images" in photos.prepare_folder("grocery", target, two)
    assert (target / "b/2.jpg").read_bytes() == b"2"
    assert "already" in photos.prepare_folder("grocery", target, broken)
    (target / "a/1.jpg").unlink()
    with pytest.raises(UserError, match="exists with 1 images instead of 2"):
        photos.prepare_folder("grocery", target, two)


def test_weights_are_checked_by_their_name(tmp_path: Path) -> None:
    path = tmp_path / photos.MOBILENET_FILE
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="torchvision's file begins with b0353104"):
        photos.prepare_mobilenet(path)


def test_every_set_has_help_and_a_place(tmp_path: Path) -> None:
    for name in photos.HELP:
        parser = argparse.ArgumentParser()
        photos.add_arguments(name, parser)
        assert parser.parse_args([]).out == "data"
