"""Labelled images in files: class folders, ImageNet, a table in CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patchreg.datasets.base import LabelledDataset
from patchreg.registry import DATASETS
from patchreg.utils.errors import DataError, MissingFileError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def images_below(folder: str) -> Iterator[str]:
    """Yield the paths of image files below a folder, sorted; hidden entries are left out.

    Args:
        folder: Folder to walk through; links are followed. Paths are relative to it.
    """
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.name.lower().endswith(EXTENSIONS):
            yield entry.name
        elif entry.is_dir():
            for name in images_below(entry.path):
                yield os.path.join(entry.name, name)


class _FileDataset(LabelledDataset):
    """Common part: `paths` holds one file name per row, as bytes, relative to `data_root`."""

    paths: np.ndarray

    def read_sample(self, row: int) -> dict[str, Any]:
        """Return the path of one image; `LoadImage` reads it.

        Args:
            row: Row in `labels`.
        """
        return {"img_path": os.path.join(self.data_root, os.fsdecode(self.paths[row]))}

    def set_samples(self, paths: Sequence[str], labels: Sequence[int]) -> None:
        """Store paths and labels as arrays, which loader workers share with their parent.

        Args:
            paths: File names relative to `data_root`.
            labels: One label per file.
        """
        self.paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.labels = np.asarray(labels, dtype=np.int64)


@DATASETS.register_module()
class ImageFolderDataset(_FileDataset):
    """One folder per class: `<data_root>/<split>/<class>/**/<image>`; classes in sorted order.

    Args:
        data_root: Folder of the data set.
        split: Sub-folder, such as "train"; empty when the class folders lie directly in
            `data_root`.
        classes: Names of the class folders in label order. None takes all folders, sorted; name
            them when a split may lack a class.
        pipeline: Transforms, as configs or callables, applied in order; start with `LoadImage`.
        subset: Use only this many images, the same share of every class. None uses all.
        subset_seed: Seed of the draw of the subset.
        metainfo: Extra meta information; wins over that of the data set.
        test_mode: Whether a transform that gives up on an image is an error instead of a redraw.
        indices: Use the first `indices` rows, or these rows, as in MMEngine.
        lazy_init: Look for the files at first use instead of now.

    Raises:
        MissingFileError: The folder, or the folder of a named class, does not exist.
        DataError: There is no class folder, or one without images.
    """

    SPLITS: tuple[str, ...] = ()

    def __init__(
        self,
        data_root: str,
        split: str = "",
        classes: Sequence[str] | None = None,
        pipeline: Sequence[dict | Callable] = (),
        subset: int | None = None,
        subset_seed: int = 0,
        metainfo: dict | None = None,
        test_mode: bool = False,
        indices: int | Sequence[int] | None = None,
        lazy_init: bool = False,
    ) -> None:
        self.class_folders = None if classes is None else list(classes)
        super().__init__(
            data_root=data_root,
            split=split,
            pipeline=pipeline,
            subset=subset,
            subset_seed=subset_seed,
            metainfo=metainfo,
            test_mode=test_mode,
            indices=indices,
            lazy_init=lazy_init,
        )

    def load_samples(self) -> None:
        """Walk through the class folders."""
        root = os.path.join(self.data_root, self.split)
        if not os.path.isdir(root):
            raise MissingFileError(self.missing_text(root))
        with os.scandir(root) as scan:
            found = sorted(e.name for e in scan if e.is_dir() and not e.name.startswith("."))
        folders = self.choose_folders(root, found)
        paths: list[str] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            names = [
                os.path.join(self.split, folder, name)
                for name in images_below(os.path.join(root, folder))
            ]
            if not names:
                raise DataError(
                    f"class folder '{os.path.join(root, folder)}' holds no image "
                    f"({', '.join(EXTENSIONS)}); put images into it or remove the folder"
                )
            paths += names
            labels += [label] * len(names)
        self.set_samples(paths, labels)
        self.set_classes(self.class_names(folders))
        self.check_labels(f"'{root}'")

    def missing_text(self, root: str) -> str:
        """Say what was expected where nothing was found.

        Args:
            root: Folder that does not exist.
        """
        return (
            f"folder '{root}' does not exist; expected one folder per class in it, "
            f"{root}/<class>/<image>.jpg. Check data_root and split"
        )

    def choose_folders(self, root: str, found: list[str]) -> list[str]:
        """Return the class folders in label order.

        Args:
            root: Folder that was read.
            found: Its sub-folders, sorted.
        """
        if self.class_folders is not None:
            absent = [name for name in self.class_folders if name not in set(found)]
            if absent:
                raise MissingFileError(
                    f"'{root}' lacks the folders of {len(absent)} of {len(self.class_folders)} "
                    f"named classes, the first is '{absent[0]}'; add it or correct `classes`"
                )
            return self.class_folders
        if not found:
            loose = next(images_below(root), None)
            seen = f"it holds images such as '{loose}' but" if loose else "it has"
            raise DataError(
                f"'{root}' cannot be used: {seen} no class folders; expected "
                f"{root}/<class>/<image>.jpg, or use CSVImageDataset for a table of paths and "
                "labels"
            )
        return found

    def class_names(self, folders: list[str]) -> Sequence[str]:
        """Return the names shown for the classes.

        Args:
            folders: Class folders in label order.
        """
        return folders


@DATASETS.register_module()
class ImageNetDataset(ImageFolderDataset):
    """ImageNet-1k (ILSVRC 2012): `<data_root>/{train,val}/<wnid>/<image>.JPEG`.

    Labels are the ranks of the 1000 sorted folder names.
    `metainfo["wnids"]` holds the folder names, `metainfo["classes"]` readable names where
    mmpretrain is installed, else the folder names.

    Source: Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge",
    arXiv:1409.0575.

    Args:
        data_root: Folder that holds train/ and val/.
        split: "train" or "val".
        pipeline: Transforms, as configs or callables, applied in order; start with `LoadImage`.
        subset: Use only this many images, the same share of every class. None uses all.
        subset_seed: Seed of the draw of the subset.
        metainfo: Extra meta information; wins over that of the data set.
        test_mode: Whether a transform that gives up on an image is an error instead of a redraw.
        indices: Use the first `indices` rows, or these rows, as in MMEngine.
        lazy_init: Look for the files at first use instead of now.

    Raises:
        MissingFileError: The folder of the split does not exist.
        DataError: It has not exactly 1000 class folders, or one is empty.
    """

    SPLITS = ("train", "val")
    CLASS_COUNT = 1000

    def __init__(
        self,
        data_root: str,
        split: str = "train",
        pipeline: Sequence[dict | Callable] = (),
        subset: int | None = None,
        subset_seed: int = 0,
        metainfo: dict | None = None,
        test_mode: bool = False,
        indices: int | Sequence[int] | None = None,
        lazy_init: bool = False,
    ) -> None:
        super().__init__(
            data_root=data_root,
            split=split,
            pipeline=pipeline,
            subset=subset,
            subset_seed=subset_seed,
            metainfo=metainfo,
            test_mode=test_mode,
            indices=indices,
            lazy_init=lazy_init,
        )

    def _layout(self) -> str:
        return (
            f"Expected {self.data_root}/train/<wnid>/*.JPEG and "
            f"{self.data_root}/val/<wnid>/*.JPEG with {self.CLASS_COUNT} folders n01440764 ... "
            "n15075141 each. Validation images in one flat folder are sorted into class folders, "
            "by links, with: python tools/prepare_data.py imagenet --val-images DIR --out "
            f"{self.data_root}"
        )

    def missing_text(self, root: str) -> str:
        """Say what was expected where nothing was found.

        Args:
            root: Folder that does not exist.
        """
        return f"ImageNet split '{self.split}': folder '{root}' does not exist. {self._layout()}"

    def choose_folders(self, root: str, found: list[str]) -> list[str]:
        """Return the class folders, checking that all are there.

        Args:
            root: Folder that was read.
            found: Its sub-folders, sorted.
        """
        if len(found) != self.CLASS_COUNT:
            raise DataError(
                f"ImageNet split '{self.split}': '{root}' has {len(found)} class folders. "
                f"{self._layout()}"
            )
        self._metainfo["wnids"] = tuple(found)
        return found

    def class_names(self, folders: list[str]) -> Sequence[str]:
        """Return the names shown for the classes.

        Args:
            folders: Class folders in label order.
        """
        try:
            from mmpretrain.datasets.categories import IMAGENET_CATEGORIES
        except ImportError:
            return folders
        return IMAGENET_CATEGORIES


@DATASETS.register_module()
class CSVImageDataset(_FileDataset):
    """Images named in a CSV table with the columns `path` and `label`.

    Labels are class names, or the numbers 0 to K-1. Paths are relative to `data_root`, or absolute.
    Other columns are ignored.

    Args:
        ann_file: The table; relative to `data_root` unless it exists as given.
        data_root: Folder that paths start from; empty means that of the table.
        classes: Class names in label order. None takes the sorted names, or the numbers, in the
            table; give them when a table may lack a class.
        pipeline: Transforms, as configs or callables, applied in order; start with `LoadImage`.
        subset: Use only this many images, the same share of every class. None uses all.
        subset_seed: Seed of the draw of the subset.
        metainfo: Extra meta information; wins over that of the data set.
        test_mode: Whether a transform that gives up on an image is an error instead of a redraw.
        indices: Use the first `indices` rows, or these rows, as in MMEngine.
        lazy_init: Read the table at first use instead of now.

    Raises:
        MissingFileError: The table, or an image named in it, does not exist.
        DataError: A line cannot be used; the text names it.
    """

    SPLITS = ()

    def __init__(
        self,
        ann_file: str,
        data_root: str = "",
        classes: Sequence[str] | None = None,
        pipeline: Sequence[dict | Callable] = (),
        subset: int | None = None,
        subset_seed: int = 0,
        metainfo: dict | None = None,
        test_mode: bool = False,
        indices: int | Sequence[int] | None = None,
        lazy_init: bool = False,
    ) -> None:
        self.table = Path(ann_file)
        if not self.table.is_file() and data_root:
            self.table = Path(data_root, ann_file)
        self.class_list = None if classes is None else list(classes)
        super().__init__(
            data_root=data_root or str(self.table.parent),
            split="",
            pipeline=pipeline,
            subset=subset,
            subset_seed=subset_seed,
            metainfo=metainfo,
            test_mode=test_mode,
            indices=indices,
            lazy_init=lazy_init,
        )

    def load_samples(self) -> None:
        """Read and check the table."""
        if not self.table.is_file():
            raise MissingFileError(
                f"table '{self.table}' does not exist; expected a CSV file with the header "
                "path,label"
            )
        lines, paths, names = self._read_table()
        classes = self.class_list
        if classes is None:
            numeric = all(name.isdecimal() for name in names)
            top = max((int(name) for name in names), default=-1) if numeric else -1
            classes = [str(i) for i in range(top + 1)] if numeric else sorted(set(names))
        label_of = {name: label for label, name in enumerate(classes)}
        # Numbers stand for themselves where no class has that very name.
        for label in range(len(classes)):
            label_of.setdefault(str(label), label)
        labels = []
        first: dict[str, int] = {}
        for line, path, name in zip(lines, paths, names, strict=True):
            if name not in label_of:
                raise DataError(
                    f"{self.table}:{line}: label '{name}' is none of the {len(classes)} classes "
                    f"({', '.join(classes[:5])}, ...); correct it or add it to `classes`"
                )
            label = label_of[name]
            if first.setdefault(path, label) != label:
                raise DataError(
                    f"{self.table}:{line}: '{path}' already has the label "
                    f"'{classes[first[path]]}' on an earlier line; keep one of the two"
                )
            labels.append(label)
        self.set_samples(paths, labels)
        self.set_classes(classes)
        self.check_labels(f"'{self.table}'")

    def _read_table(self) -> tuple[list[int], list[str], list[str]]:
        lines: list[int] = []
        paths: list[str] = []
        names: list[str] = []
        try:
            with self.table.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, skipinitialspace=True, strict=True)
                columns = reader.fieldnames or []
                absent = [name for name in ("path", "label") if name not in columns]
                if absent:
                    raise DataError(
                        f"{self.table}:1: column '{absent[0]}' is missing (found: "
                        f"{', '.join(columns)}); the first line must be: path,label"
                    )
                for row in reader:
                    lines.append(reader.line_num)
                    paths.append((row["path"] or "").strip())
                    names.append((row["label"] or "").strip())
                    self._check_row(reader.line_num, paths[-1], names[-1])
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(
                f"{self.table}, after line {lines[-1] if lines else 1}: not a CSV text in UTF-8 "
                f"({error}); save the table again as UTF-8"
            ) from error
        return lines, paths, names

    def _check_row(self, line: int, path: str, name: str) -> None:
        if not path or not name:
            raise DataError(
                f"{self.table}:{line}: {'path' if not path else 'label'} is empty; expected "
                "<image file>,<label>"
            )
        full = os.path.join(self.data_root, path)
        if not os.path.isfile(full):
            raise MissingFileError(
                f"{self.table}:{line}: image '{full}' does not exist; paths are relative to "
                f"'{self.data_root}' (set data_root to change that)"
            )
