"""Functional Map of the World: the annotated boxes with context as single images, and their tables."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patchreg.datasets.fmow import FMOW_CLASSES
from patchreg.utils.errors import ConfigError, DataError, MissingFileError
from patchreg.utils.files import write_safely

HELP = {"fmow": "cut the annotated boxes of fMoW out of its scenes and list them in tables"}
FACTORS = ((0.1, 2.0), (0.2, 1.0), (0.3, 0.5), (0.4, 0.3), (0.5, 0.2))
"""Upper limit of the ratio of box side to image side, and the context factor below it."""
USUAL_FACTOR = 0.15
SMALLEST = 2


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        name: "fmow".
        parser: Where to add them.
    """
    parser.add_argument(
        "--source",
        required=True,
        help="unpacked fMoW-rgb, with train/<class>/... and val/<class>/...",
    )
    parser.add_argument("--out", required=True, help="root of the crops: <out>/train.csv, test.csv")
    parser.add_argument(
        "--test-split", default="val", help="folder of the source that becomes test (default val)"
    )
    parser.add_argument(
        "--baseline-sides",
        action="store_true",
        help="divide the width by the image height and the height by its width, as the fMoW baseline",
    )


def run(name: str, arguments: argparse.Namespace) -> str:
    """Cut the crops and say what is where.

    Args:
        name: "fmow".
        arguments: Parsed options.
    """
    return prepare_fmow(
        arguments.source, arguments.out, arguments.test_split, arguments.baseline_sides
    )


def context_factor(ratio: float) -> float:
    """Return how much context a box gets, relative to its side.

    Source:
        `data_ml_functions/dataFunctions.py` of the fMoW baseline, quoted by PatchDrop's README.

    Args:
        ratio: Side of the box over side of the image.
    """
    return next((factor for limit, factor in FACTORS if ratio < limit), USUAL_FACTOR)


def crop_box(
    box: Sequence[float], image_size: tuple[int, int], baseline_sides: bool = False
) -> tuple[int, int, int, int] | None:
    """Return the pixels to cut out for an annotated box, or None for one that is too small.

    Source:
        The fMoW baseline's adaptive context.

    Args:
        box: Left, top, width, height in px.
        image_size: Width and height of the scene in px.
        baseline_sides: Divide the width by the scene's height and the height by its width, as the
            baseline does.

    Returns:
        Left, top, right, bottom, half-open, inside the scene.
    """
    left, top, width, height = (int(value) for value in box)
    if width <= SMALLEST or height <= SMALLEST:
        return None
    across, down = image_size[::-1] if baseline_sides else image_size
    more_x = int(width * context_factor(width / across) / 2)
    more_y = int(height * context_factor(height / down) / 2)
    return (
        max(left - more_x, 0),
        max(top - more_y, 0),
        min(left + width + more_x, image_size[0]),
        min(top + height + more_y, image_size[1]),
    )


def prepare_fmow(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    test_split: str = "val",
    baseline_sides: bool = False,
) -> str:
    """Cut every annotated box of fMoW-rgb out of its scene and write the tables.

    Makes `<out>/{train,test}/<class>/<scene>_<box>.jpg` and `<out>/{train,test}.csv` with lines
    `class id,path`. Crops that exist are kept, so an interrupted run goes on.

    Args:
        source: Folder with `train` and the test split, each with class folders of scenes (`.jpg`)
            and their annotations (`.json` of the same name).
        out: Root of the crops.
        test_split: Folder of the source that becomes the test set.
        baseline_sides: As in `crop_box`.

    Returns:
        One line that says what is where.

    Raises:
        MissingFileError: A folder or a scene is not there.
        DataError: An annotation cannot be used.
        ConfigError: The output would lie in the source.
    """
    root, target = Path(source), Path(out)
    if target.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"--out '{target}' lies inside --source; choose another folder")
    counts = {}
    for name, folder in (("train", root / "train"), ("test", root / test_split)):
        if not folder.is_dir():
            raise MissingFileError(
                f"'{folder}' does not exist; --source is the unpacked fMoW-rgb with train/ and "
                f"{test_split}/ (set --test-split for another name)"
            )
        rows = []
        for scene in sorted(folder.rglob("*.json")):
            rows += _cut_scene(scene, target, name, baseline_sides)
            if len(rows) % 1000 < 5 and rows:
                print(f"fmow: {len(rows)} crops of {name}", flush=True)
        if not rows:
            raise DataError(f"'{folder}' holds no annotation (*.json) with a usable box")
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_safely(target / f"{name}.csv", text.getvalue().encode())
        counts[name] = len(rows)
    return f"fmow: {counts['train']} training and {counts['test']} test crops in {target}"


def _cut_scene(
    annotation: Path, out: Path, split: str, baseline_sides: bool
) -> list[tuple[int, str]]:
    from PIL import Image

    from patchreg.transforms.loading import to_rgb8

    try:
        boxes = json.loads(annotation.read_text(encoding="utf-8"))["bounding_boxes"]
        entries: list[tuple[str, Any]] = [(box["category"], box["box"]) for box in boxes]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"'{annotation}' is no annotation of fMoW ({type(error).__name__}: {error}); expected "
            "bounding_boxes with category and box"
        ) from error
    picture = annotation.with_suffix(".jpg")
    if not picture.is_file():
        raise MissingFileError(f"the scene '{picture}' of '{annotation.name}' does not exist")
    with Image.open(picture) as opened:
        image = to_rgb8(opened).copy()
    rows = []
    for number, (category, box) in enumerate(entries):
        if category == "false_detection":
            continue
        if category not in FMOW_CLASSES:
            raise DataError(f"'{annotation}': '{category}' is none of the 62 classes of fMoW")
        path = out / split / category / f"{annotation.stem}_{number}.jpg"
        cut = crop_box(box, image.size, baseline_sides)
        if cut is None:
            continue
        if cut[0] >= cut[2] or cut[1] >= cut[3]:
            raise DataError(f"'{annotation}': box {number} {list(box)} lies outside the scene")
        if not path.is_file():
            content = io.BytesIO()
            image.crop(cut).save(content, "JPEG", quality=95)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safely(path, content.getvalue())
        rows.append((FMOW_CLASSES.index(category), str(path.relative_to(out))))
    return rows
