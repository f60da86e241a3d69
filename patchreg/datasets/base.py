"""What every labelled image data set of this package shares."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log

from patchreg.registry import TRANSFORMS
from patchreg.utils.errors import ConfigError, DataError


class LabelledDataset(BaseDataset):
    """Data set whose annotations are one integer label per row, kept as arrays and not as dicts.

    A subclass fills `labels` and, through `set_classes`, the class names in `load_samples`, and
    returns the content of one row from `read_sample`. Images are RGB, height x width x channel,
    uint8, everywhere in this package.

    Differs from official:
        `mmengine.dataset.BaseDataset` pickles one dict per image; a million images cost seconds and
        hundreds of megabytes there, and two arrays here.

    Args:
        data_root: Folder of the data set.
        split: Part of the data set.
        pipeline: Transforms, as configs or callables, applied in order.
        subset: Use only this many images, the same share of every class, drawn once by
            `subset_seed`. A smaller subset lies inside a larger one. None uses all.
        subset_seed: Seed of that draw.
        metainfo: Extra meta information; wins over that of the data set.
        test_mode: Whether a transform that gives up on an image is an error instead of a redraw.
        indices: Use the first `indices` rows, or these rows, as in MMEngine.
        lazy_init: Read the annotations at first use instead of now.

    Raises:
        ConfigError: `split` or `subset` is not possible.
    """

    SPLITS: tuple[str, ...] = ("train", "test")

    def __init__(
        self,
        data_root: str = "",
        split: str = "train",
        pipeline: Sequence[dict | Callable] = (),
        subset: int | None = None,
        subset_seed: int = 0,
        metainfo: dict | None = None,
        test_mode: bool = False,
        indices: int | Sequence[int] | None = None,
        lazy_init: bool = False,
    ) -> None:
        if self.SPLITS and split not in self.SPLITS:
            raise ConfigError(
                f"{type(self).__name__}: split={split!r} does not exist; use one of {self.SPLITS}"
            )
        if subset is not None and subset < 1:
            raise ConfigError(f"subset={subset} must be at least 1, or None for all images")
        self.split = split
        self.subset = subset
        self.subset_seed = subset_seed
        self.labels = np.zeros(0, dtype=np.int64)
        super().__init__(
            metainfo=metainfo,
            data_root=data_root,
            data_prefix={},
            indices=indices,
            serialize_data=False,
            pipeline=[TRANSFORMS.build(t) if isinstance(t, dict) else t for t in pipeline],
            test_mode=test_mode,
            lazy_init=lazy_init,
        )

    def load_samples(self) -> None:
        """Fill `labels` and call `set_classes`."""
        raise NotImplementedError

    def read_sample(self, row: int) -> dict[str, Any]:
        """Return what the pipeline starts from, without the label.

        Args:
            row: Row in `labels`.
        """
        raise NotImplementedError

    def set_classes(self, classes: Sequence[str]) -> None:
        """Store the class names, unless `metainfo` gave them.

        Args:
            classes: One name per label.
        """
        self._metainfo.setdefault("classes", tuple(classes))

    def load_data_list(self) -> np.ndarray:
        """Return the rows in use as an int64 array."""
        self.load_samples()
        if self.subset is None:
            return np.arange(len(self.labels))
        if self.subset > len(self.labels):
            raise ConfigError(
                f"subset={self.subset} is more than the {len(self.labels)} images of "
                f"{type(self).__name__} split '{self.split}'; use a smaller number or None"
            )
        return balanced_subset(self.labels, self.subset, self.subset_seed)

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """Return the sample at a position: what `read_sample` gives, `gt_label` and `sample_idx`.

        Args:
            idx: Position in the data set.
        """
        if not self._fully_initialized:
            self.full_init()
        row = int(self.data_list[idx])
        info = self.read_sample(row)
        info["gt_label"] = int(self.labels[row])
        info["sample_idx"] = int(idx) if idx >= 0 else len(self) + int(idx)
        return info

    def get_gt_labels(self) -> np.ndarray:
        """Return the label of every sample, in order."""
        if not self._fully_initialized:
            self.full_init()
        return self.labels[np.asarray(self.data_list, dtype=np.int64)]

    def get_cat_ids(self, idx: int) -> list[int]:
        """Return the label of one sample as a list (used by `ClassBalancedDataset`).

        Args:
            idx: Position in the data set.
        """
        return [int(self.get_gt_labels()[idx])]

    def note(self, text: str) -> None:
        """Log a line about the data.

        Args:
            text: The line.
        """
        print_log(text, logger="current", level=logging.INFO)

    def check_labels(self, source: str) -> None:
        """Check that there are samples and that labels fit the classes.

        Args:
            source: Where the samples came from, for the message.

        Raises:
            DataError: No sample, or a label without a class.
        """
        if not len(self.labels):
            raise DataError(
                f"{source} holds no samples; give a folder or file with at least one image"
            )
        count = len(self._metainfo["classes"])
        if self.labels.min() < 0 or self.labels.max() >= count:
            raise DataError(
                f"{source} holds labels from {self.labels.min()} to {self.labels.max()}, but "
                f"there are {count} classes (labels 0 to {count - 1}); correct the labels or the "
                "class list"
            )


def balanced_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose rows so that all classes are as equally frequent as possible.

    Args:
        labels: Label per row.
        count: Rows wanted, at most `len(labels)`.
        seed: Seed of the permutation the rows are taken from.

    Returns:
        `count` rows in the order of the permutation. The rows for a smaller count are among them.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    permuted = labels[order]
    # Rank of each row within its class; taking rows by (rank, class) fills all classes evenly.
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(permuted == label)
        rank[members] = np.arange(len(members))
    chosen = np.lexsort((permuted, rank))[:count]
    return order[np.sort(chosen)]
