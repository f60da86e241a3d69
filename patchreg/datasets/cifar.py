"""CIFAR-10 and CIFAR-100 from files on this machine; nothing is downloaded here."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from patchreg.datasets.base import LabelledDataset
from patchreg.registry import DATASETS
from patchreg.utils.errors import DataError, MissingFileError
from patchreg.utils.pickles import unpickle_arrays

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
# The fine labels, in label order.
CIFAR100_CLASSES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
    plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()  # noqa: SIM905 - quoted, it fills a hundred lines
)

PIXELS = 32 * 32 * 3


def read_pickled_batch(path: Path, md5: str | None) -> dict[bytes, Any]:
    """Read one file of the official Python version of CIFAR.

    Args:
        path: File to read.
        md5: Checksum of the official file; None skips the check (tests of the unpickler only).

    Raises:
        DataError: The checksum differs, or the pickle refers to more than arrays.
    """
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 is not None and found != md5:
        raise DataError(
            f"'{path}' is not the official file (md5 {found}, expected {md5}); it is not opened "
            "because unpickling a foreign file can run code. Fetch the official archive again"
        )
    try:
        return unpickle_arrays(content, encoding="bytes")
    except pickle.UnpicklingError as error:
        raise DataError(f"'{path}' is not loaded: {error}") from error


def records_to_images(records: np.ndarray) -> np.ndarray:
    """Turn planar RGB rows into images.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html, "binary version".

    Args:
        records: Rows of 1024 red, 1024 green, 1024 blue values, each plane in raster order.

    Shape:
        records [N, 3072], returns [N, 32, 32, 3] uint8 RGB.
    """
    return np.ascontiguousarray(records.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


class _CIFARDataset(LabelledDataset):
    """Common part of the two sets; the subclass holds the constants of its files."""

    NAME = ""
    BINARY_DIR = ""
    PYTHON_DIR = ""
    # (python file, its md5, binary file) in order, per split
    FILES: dict[str, tuple[tuple[str, str, str], ...]] = {}
    COUNTS = {"train": 50000, "test": 10000}
    LABEL_BYTES = 1  # the label is the last of these
    LABEL_KEY = b"labels"

    images: np.ndarray

    def load_samples(self) -> None:
        """Read images and labels from the first layout that is there."""
        loaded = self.find_arrays(Path(self.data_root))
        if loaded is None:
            raise MissingFileError(self.missing_text())
        self.images, self.labels = loaded
        self.check_labels(f"{self.NAME} under '{self.data_root}'")

    def read_sample(self, row: int) -> dict[str, Any]:
        """Return a writable copy of one image.

        Args:
            row: Row in `labels`.
        """
        return {"img": np.array(self.images[row]), "img_shape": (32, 32), "ori_shape": (32, 32)}

    def missing_text(self) -> str:
        """Say which layouts are understood and how to get the data."""
        binary = ", ".join(entry[2] for entry in self.FILES["train"] + self.FILES["test"])
        return (
            f"{self.NAME} was not found under '{self.data_root}'. Expected one of: the prepared "
            "files train_images.npy, train_labels.npy, test_images.npy, test_labels.npy; a folder "
            f"{self.BINARY_DIR}/ with {binary}; a folder {self.PYTHON_DIR}/ of the Python version. "
            f"Make the first with: python tools/prepare_data.py {self.NAME} --out "
            f"{Path(self.data_root).parent}"
        )

    def find_arrays(self, root: Path) -> tuple[np.ndarray, np.ndarray] | None:
        """Return images [N, 32, 32, 3] uint8 and labels [N] int64, or None when nothing is there.

        Args:
            root: Folder to look into.

        Raises:
            DataError: Files are there but are not what they should be.
        """
        names = f"{self.split}_images.npy", f"{self.split}_labels.npy"
        if all((root / name).is_file() for name in names):
            return self._prepared(root / names[0], root / names[1])
        for folder in (root / self.BINARY_DIR, root):
            paths = [folder / entry[2] for entry in self.FILES[self.split]]
            if all(path.is_file() for path in paths):
                return self._binary(paths)
        for folder in (root / self.PYTHON_DIR, root):
            paths = [folder / entry[0] for entry in self.FILES[self.split]]
            if all(path.is_file() for path in paths):
                return self._pickled(paths)
        return None

    def _prepared(self, images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
        count = self.COUNTS[self.split]
        try:
            pixels = np.load(images, mmap_mode="r", allow_pickle=False)
            targets = np.load(labels, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise DataError(
                f"'{images}' or '{labels.name}' cannot be read ({error}); delete both and run "
                f"python tools/prepare_data.py {self.NAME} again"
            ) from error
        if pixels.shape != (count, 32, 32, 3) or pixels.dtype != np.uint8:
            raise DataError(
                f"'{images}' holds {pixels.dtype} {pixels.shape}; expected uint8 ({count}, 32, "
                f"32, 3). Delete it and run python tools/prepare_data.py {self.NAME} again"
            )
        if targets.shape != (count,):
            raise DataError(f"'{labels}' holds {targets.shape} labels; expected ({count},)")
        return pixels, targets.astype(np.int64)

    def _binary(self, paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        size = self.LABEL_BYTES + PIXELS
        parts = []
        for path in paths:
            flat = np.fromfile(path, dtype=np.uint8)
            expected = self.COUNTS[self.split] // len(paths)
            if flat.size != expected * size:
                raise DataError(
                    f"'{path}' has {flat.size} bytes; expected {expected} records of {size} bytes. "
                    "Fetch the official archive again"
                )
            parts.append(flat.reshape(expected, size))
        records = np.concatenate(parts)
        labels = records[:, self.LABEL_BYTES - 1].astype(np.int64)
        return records_to_images(records[:, self.LABEL_BYTES :]), labels

    def _pickled(self, paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        known = {entry[0]: entry[1] for entry in self.FILES[self.split]}
        batches = [read_pickled_batch(path, known[path.name]) for path in paths]
        images = np.concatenate([records_to_images(batch[b"data"]) for batch in batches])
        labels = np.concatenate([np.asarray(batch[self.LABEL_KEY]) for batch in batches])
        return images, labels.astype(np.int64)


@DATASETS.register_module()
class CIFAR10Dataset(_CIFARDataset):
    """CIFAR-10: 50000 training and 10000 test images, 32 x 32 RGB, 10 classes.

    Reads, in this order: the files of `tools/prepare_data.py cifar10` (memory-mapped), the official
    binary version, the official Python version (only after its checksum matched, and with an
    unpickler that knows arrays only). Samples carry `img` (uint8 RGB, height x width x channel),
    `gt_label`, `sample_idx`.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html.

    Args:
        data_root: Folder with the files, or with the official folder.
        split: "train" or "test".
        pipeline: Transforms, as configs or callables, applied in order.
        subset: Use only this many images, the same share of every class. None uses all.
        subset_seed: Seed of the draw of the subset.
        metainfo: Extra meta information; wins over that of the data set.
        test_mode: Whether a transform that gives up on an image is an error instead of a redraw.
        indices: Use the first `indices` rows, or these rows, as in MMEngine.
        lazy_init: Read the files at first use instead of now.

    Raises:
        MissingFileError: Nothing is under `data_root`; the text says how to get it.
        DataError: A file is damaged or not the official one.
    """

    METAINFO = {"classes": CIFAR10_CLASSES}
    NAME = "cifar10"
    BINARY_DIR = "cifar-10-batches-bin"
    PYTHON_DIR = "cifar-10-batches-py"
    FILES = {
        "train": (
            ("data_batch_1", "c99cafc152244af753f735de768cd75f", "data_batch_1.bin"),
            ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec", "data_batch_2.bin"),
            ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751", "data_batch_3.bin"),
            ("data_batch_4", "634d18415352ddfa80567beed471001a", "data_batch_4.bin"),
            ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb", "data_batch_5.bin"),
        ),
        "test": (("test_batch", "40351d587109b95175f43aff81a1287e", "test_batch.bin"),),
    }


@DATASETS.register_module()
class CIFAR100Dataset(_CIFARDataset):
    """CIFAR-100 with its 100 fine labels: 50000 training and 10000 test images, 32 x 32 RGB.

    Reads the same three layouts as `CIFAR10Dataset`.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html.

    Args:
        data_root: Folder with the files, or with the official folder.
        split: "train" or "test".
        pipeline: Transforms, as configs or callables, applied in order.
        subset: Use only this many images, the same share of every class. None uses all.
        subset_seed: Seed of the draw of the subset.
        metainfo: Extra meta information; wins over that of the data set.
        test_mode: Whether a transform that gives up on an image is an error instead of a redraw.
        indices: Use the first `indices` rows, or these rows, as in MMEngine.
        lazy_init: Read the files at first use instead of now.

    Raises:
        MissingFileError: Nothing is under `data_root`; the text says how to get it.
        DataError: A file is damaged or not the official one.
    """

    METAINFO = {"classes": CIFAR100_CLASSES}
    NAME = "cifar100"
    BINARY_DIR = "cifar-100-binary"
    PYTHON_DIR = "cifar-100-python"
    FILES = {
        "train": (("train", "16019d7e3df5f24257cddd939b257f8d", "train.bin"),),
        "test": (("test", "f0ef6b0ae62326f3e7ffdfab6717acfc", "test.bin"),),
    }
    LABEL_BYTES = 2
    LABEL_KEY = b"fine_labels"
