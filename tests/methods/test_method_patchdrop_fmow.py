"""fMoW: table, images of all kinds, crops with context, and every error named."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_reader import folder, load
from mmengine.registry import init_default_scope
from PIL import Image
from safetensors import safe_open

from patchreg.datasets.fmow import FMOW_CLASSES
from patchreg.datasets.prepare import preparers
from patchreg.datasets.prepare.fmow import context_factor, crop_box
from patchreg.registry import DATASETS, MODELS
from patchreg.utils.errors import ConfigError, DataError, MissingFileError

PIPELINE = [
    dict(type="LoadImage"),
    dict(type="mmpretrain.ResizeEdge", scale=224, edge="short", backend="pillow"),
    dict(type="mmpretrain.CenterCrop", crop_size=224),
    dict(type="mmpretrain.PackInputs"),
]


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope("patchreg")


def dataset(table: Path, **kwargs: Any) -> Any:
    config = dict(type="FMoWDataset", ann_file=str(table), data_root=str(table.parent), **kwargs)
    return DATASETS.build(config)


def test_table_of_the_reference(tmp_path: Path) -> None:
    file = load("patchdrop", "14_fmow_csv")
    with safe_open(folder("patchdrop") / "14_fmow_csv.safetensors", framework="pt") as raw:
        names = (raw.metadata() or {})["file_names"]
    names = json.loads(names) if names.startswith("[") else names.split(",")
    rows = bytes(file["csv"].tolist()).decode().strip().splitlines()
    kept = []
    for index, (name, row) in enumerate(zip(names, rows, strict=True)):
        if f"file{index}" in file:
            path = tmp_path / row.split(",", 1)[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(file[f"file{index}"].tolist()))
            assert path.name == Path(name).name
            kept.append((index, row))
    table = tmp_path / "test.csv"
    table.write_text("\n".join(row for _, row in kept) + "\n")
    found = dataset(table, pipeline=PIPELINE)
    assert len(found) == len(kept)
    normalise = MODELS.build(dict(type="ImagePreprocessor"))
    for position, (index, row) in enumerate(kept):
        sample = found[position]
        assert sample["data_samples"].gt_label.item() == file[f"item{index}.label"].item()
        image = normalise(dict(inputs=sample["inputs"][None]))["inputs"][0]
        png = row.endswith(".png")
        pixels = (image[:, ::7, ::7] - file[f"item{index}.sub7"]).abs().max()
        blocks = (F.avg_pool2d(image, 16) - file[f"item{index}.block16"]).abs().max()
        assert pixels <= (0.02 if png else 0.06)
        assert blocks <= (2e-3 if png else 0.01)


def write_images(root: Path) -> None:
    rng = np.random.default_rng(0)
    modes = {"grey.png": "L", "alpha.png": "RGBA", "palette.png": "P", "colour.jpg": "RGB"}
    for name, mode in modes.items():
        image = Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8))
        image.convert(mode).save(root / name)


def test_grey_transparent_and_palette_images_are_read_as_rgb(tmp_path: Path) -> None:
    write_images(tmp_path)
    table = tmp_path / "t.csv"
    table.write_text("0,grey.png\n1,alpha.png\n2,palette.png\n61,colour.jpg\n")
    found = dataset(table, pipeline=PIPELINE)
    assert [found[i]["inputs"].shape for i in range(4)] == [torch.Size([3, 224, 224])] * 4
    assert found.get_gt_labels().tolist() == [0, 1, 2, 61]
    assert found.metainfo["classes"] == FMOW_CLASSES
    assert len(FMOW_CLASSES) == 62
    assert list(FMOW_CLASSES) == sorted(FMOW_CLASSES)


def test_data_prefix(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images")
    table = tmp_path / "t.csv"
    table.write_text("3,grey.png\n")
    with pytest.raises(MissingFileError, match="data_prefix"):
        dataset(table)
    found = dataset(table, data_prefix=str(tmp_path / "images"))
    assert found.get_data_info(0)["img_path"] == str(tmp_path / "images" / "grey.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no samples"),
        ("label,path\n0,grey.png\n", ":1: 'label' is no class id.*no header"),
        ("grey.png,0\n", "swapped"),
        ("0,grey.png\n62,grey.png\n", ":2: class id 62 is outside 0..61"),
        ("1.5,grey.png\n", "no class id"),
        ("-1,grey.png\n", "no class id"),
        ("0,grey.png,x\n", "3 columns"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    write_images(tmp_path)
    table = tmp_path / "t.csv"
    table.write_text(text)
    with pytest.raises(DataError, match=message):
        dataset(table)


def test_missing_table_and_image(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"prepare_data.py fmow"):
        dataset(tmp_path / "none.csv")
    table = tmp_path / "t.csv"
    table.write_text("0,none.jpg\n")
    with pytest.raises(MissingFileError, match=":1: image"):
        dataset(table)


def test_context_grows_as_boxes_shrink() -> None:
    ratios = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0)
    assert [context_factor(r) for r in ratios] == [2, 1, 0.5, 0.3, 0.2, 0.15, 0.15]


def test_crop_boxes() -> None:
    # width 100 of 1000 (factor 1): 50 on both sides; height 300 of 1000 (0.3): 45.
    assert crop_box((400, 400, 100, 300), (1000, 1000)) == (350, 355, 550, 745)
    # clipped at the edges
    assert crop_box((0, 900, 100, 100), (1000, 1000)) == (0, 850, 150, 1000)
    assert crop_box((5, 5, 2, 50), (100, 100)) is None
    assert crop_box((5, 5, 50, 2), (100, 100)) is None
    # 200 of 1000 is 0.2 (factor 0.5), of 500 it is 0.4 (factor 0.2)
    assert crop_box((400, 200, 200, 60), (1000, 500))[::2] == (350, 650)
    assert crop_box((400, 200, 200, 60), (1000, 500), baseline_sides=True)[::2] == (380, 620)


def scene(path: Path, category: str, box: list[float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(1).integers(0, 255, (100, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    text = {"bounding_boxes": [{"category": category, "box": box}]}
    path.with_suffix(".json").write_text(json.dumps(text))


def prepare(source: Path, out: Path, *more: str) -> str:
    module = preparers()["fmow"]
    parser = argparse.ArgumentParser()
    module.add_arguments("fmow", parser)
    options = parser.parse_args(["--source", str(source), "--out", str(out), *more])
    return module.run("fmow", options)


def test_scenes_become_crops_and_tables(tmp_path: Path) -> None:
    source, out = tmp_path / "rgb", tmp_path / "crops"
    scene(source / "train" / "airport" / "airport_0" / "a.jpg", "airport", [30, 30, 60, 40])
    scene(source / "train" / "zoo" / "zoo_0" / "z.jpg", "zoo", [30, 30, 2, 40])
    scene(source / "val" / "zoo" / "zoo_1" / "v.jpg", "zoo", [0, 0, 120, 100])
    assert "1 training and 1 test crops" in prepare(source, out)
    before = (out / "train" / "airport" / "a_0.jpg").stat().st_mtime_ns
    prepare(source, out)
    assert (out / "train" / "airport" / "a_0.jpg").stat().st_mtime_ns == before
    found = dataset(out / "train.csv", pipeline=[dict(type="LoadImage")])
    # width 60 of 120 (0.5: factor 0.15): 4 px; height 40 of 100 (0.4: factor 0.2): 4 px.
    assert found[0]["img"].shape == (48, 68, 3)
    assert found[0]["gt_label"] == 0
    assert (out / "test.csv").read_text() == "61,test/zoo/v_0.jpg\n"


def test_sources_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="unpacked fMoW-rgb"):
        prepare(tmp_path, tmp_path.parent / "out")
    scene(tmp_path / "train" / "a.jpg", "castle", [3, 3, 30, 30])
    with pytest.raises(ConfigError, match="inside --source"):
        prepare(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="none of the 62"):
        prepare(tmp_path, tmp_path.parent / "out")
    (tmp_path / "train" / "a.json").write_text("{}")
    with pytest.raises(DataError, match="no annotation of fMoW"):
        prepare(tmp_path, tmp_path.parent / "out")
    (tmp_path / "train" / "a.json").write_text('{"bounding_boxes": []}')
    with pytest.raises(DataError, match="no annotation"):
        prepare(tmp_path, tmp_path.parent / "out")
