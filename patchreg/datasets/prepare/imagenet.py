"""ImageNet's validation images in class folders."""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
from pathlib import Path

from patchreg.datasets.image_files import images_below
from patchreg.utils.errors import DataError, MissingFileError, UserError

HELP = {"imagenet": "sort flat validation images into class folders, by links"}
WNID = re.compile(r"n\d{8}")


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        name: "imagenet".
        parser: Where to add them.
    """
    parser.add_argument("--val-images", required=True, help="folder with ILSVRC2012_val_*.JPEG")
    parser.add_argument(
        "--out", required=True, help="root of the data set; makes <out>/val/<wnid>/"
    )
    parser.add_argument(
        "--labels",
        help="devkit folder, LOC_val_solution.csv, folder of XML files, or '<image> <wnid>' lines",
    )


def run(name: str, arguments: argparse.Namespace) -> str:
    """Sort the images and say what is where.

    Args:
        name: "imagenet".
        arguments: Parsed options.
    """
    return prepare_imagenet(arguments.val_images, arguments.out, arguments.labels)


def prepare_imagenet(
    val_images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    labels: str | os.PathLike[str] | None = None,
) -> str:
    """Sort the flat folder of ImageNet validation images into class folders, by relative links.

    Makes `<out>/val/<wnid>/<image>`. Running it again adds what is missing.

    Args:
        val_images: Folder with ILSVRC2012_val_00000001.JPEG and so on.
        out: Root of the data set.
        labels: Where the labels are, see `read_val_labels`; None looks beside the images.

    Returns:
        One line that says what is where.

    Raises:
        MissingFileError: The images or the labels are not there.
        DataError: An image has no label, or something else is in the place of a link.
    """
    folder = Path(val_images).resolve()
    if not folder.is_dir():
        raise MissingFileError(f"--val-images: folder '{folder}' does not exist")
    names = [name for name in images_below(str(folder)) if os.sep not in name]
    if not names:
        raise DataError(
            f"'{folder}' holds no images directly; expected ILSVRC2012_val_00000001.JPEG and so "
            "on. Class folders need no preparation: put them in place, or link them, as <out>/val"
        )
    source = Path(labels) if labels is not None else _find_labels(folder)
    wnid_of = read_val_labels(source)
    unknown = [name for name in names if Path(name).stem not in wnid_of]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(names)} images in '{folder}' have no label in '{source}', "
            f"the first is '{unknown[0]}'; give the labels of this image set with --labels"
        )
    root = Path(out) / "val"
    made = 0
    for count, name in enumerate(names, 1):
        made += _link(folder / name, root / wnid_of[Path(name).stem] / name)
        if count % 10000 == 0:
            print(f"imagenet: {count} of {len(names)} images", flush=True)
    classes = {wnid_of[Path(name).stem] for name in names}
    if len(names) < len(wnid_of):
        print(
            f"imagenet: {len(wnid_of) - len(names)} labelled images are not in '{folder}'",
            flush=True,
        )
    train = Path(out) / "train"
    if not train.is_dir():
        print(
            f"imagenet: for training put or link the training class folders as {train}", flush=True
        )
    return f"imagenet: {len(names)} images of {len(classes)} classes in {root} ({made} new links)"


def _link(image: Path, link: Path) -> int:
    """Link to an image unless that was done before; return how many links were made."""
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() or link.exists():
            if link.exists() and link.samefile(image):
                return 0
            raise DataError(
                f"'{link}' exists and is not a link to '{image}'; move it away and run again"
            )
        link.symlink_to(os.path.relpath(image, link.parent.resolve()))
    except OSError as error:
        raise UserError(
            f"cannot link '{link}' ({error}); choose a folder with --out whose file system has "
            "links"
        ) from error
    return 1


def _find_labels(images: Path) -> Path:
    names = (
        "LOC_val_solution.csv",
        "ILSVRC2012_devkit_t12",
        "devkit",
        "ILSVRC2012_validation_ground_truth.txt",
    )
    for folder in (images, images.parent):
        for name in names:
            if (folder / name).exists():
                return folder / name
    raise MissingFileError(
        f"no labels were found beside '{images}'; name them with --labels: the unpacked folder "
        "ILSVRC2012_devkit_t12 (from image-net.org), LOC_val_solution.csv (Kaggle), the folder of "
        "validation XML files, or a text file with lines '<image> <wnid or label 0-999>'"
    )


def read_val_labels(source: Path) -> dict[str, str]:
    """Read the wnid of every validation image, by image name without extension.

    Args:
        source: One of: the devkit folder of ILSVRC 2012 (or its ground-truth file, with meta.mat
            beside it); a CSV with the columns ImageId, PredictionString; a folder of XML
            annotations; a text file with lines `<image> <wnid>` or `<image> <label>`, labels 0 to
            999 in the order of sorted wnids.

    Raises:
        MissingFileError: The file or folder, or meta.mat, is missing.
        DataError: A line cannot be used.
    """
    if not source.exists():
        raise MissingFileError(f"--labels: '{source}' does not exist")
    if source.is_dir():
        truth = next(iter(sorted(source.rglob("*validation_ground_truth.txt"))), None)
        return _from_xml(source) if truth is None else _from_devkit(truth)
    if source.name.endswith("validation_ground_truth.txt"):
        return _from_devkit(source)
    found: dict[str, str] = {}
    try:
        text = source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"'{source}' is no UTF-8 text ({error}); save it as UTF-8") from error
    with io.StringIO(text, newline="") as file:
        rows = csv.reader(file) if source.suffix == ".csv" else (line.split() for line in file)
        for line, row in enumerate(rows, 1):
            if not row or row[0] == "ImageId":
                continue
            target = row[1].split()[0] if len(row) > 1 and row[1].strip() else ""
            wnid = target if WNID.fullmatch(target) else _wnid_of_label(target)
            if wnid is None:
                raise DataError(
                    f"{source}:{line}: '{','.join(row)[:60]}' is not '<image> <wnid or label "
                    "0-999>'"
                )
            found[Path(row[0]).stem] = wnid
    return found


def _wnid_of_label(text: str) -> str | None:
    if not text.isdecimal() or int(text) > 999:
        return None
    from timm.data import ImageNetInfo

    return ImageNetInfo().label_names()[int(text)]


def _from_xml(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*.xml")):
        match = re.search(r"<name>\s*(n\d{8})\s*</name>", path.read_text(encoding="utf-8"))
        if match is None:
            raise DataError(f"'{path}' names no object <name>nXXXXXXXX</name>")
        found[path.stem] = match.group(1)
    if not found:
        raise MissingFileError(
            f"--labels: '{folder}' holds neither ILSVRC2012_validation_ground_truth.txt nor XML "
            "files"
        )
    return found


def _from_devkit(truth: Path) -> dict[str, str]:
    """The ground truth counts classes as the devkit's meta.mat does, which is not the order of "
    "wnids."""
    meta = truth.with_name("meta.mat")
    if not meta.is_file():
        raise MissingFileError(
            f"'{meta}' does not exist, and without it the class numbers of '{truth.name}' mean "
            "nothing; use the unpacked devkit, in which both files lie in data/"
        )
    from scipy.io import loadmat

    synsets = loadmat(str(meta), squeeze_me=True)["synsets"]
    wnids = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets}
    found = {}
    for line, text in enumerate(truth.read_text(encoding="ascii").split(), 1):
        if not text.isdecimal() or not 1 <= int(text) <= 1000:
            raise DataError(f"{truth}:{line}: '{text}' is not a class number from 1 to 1000")
        found[f"ILSVRC2012_val_{line:08d}"] = wnids[int(text)]
    return found
