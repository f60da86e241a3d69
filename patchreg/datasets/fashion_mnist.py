"""The image set that comes with the package, so that every quick configuration runs without a "
"network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from patchreg.datasets.base import LabelledDataset
from patchreg.registry import DATASETS

FILE = Path(__file__).parent / "data" / "fashion_mnist_mini.npz"
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load_embedded(split: str, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Read the embedded images, padded with black on all sides and repeated to three channels.

    Args:
        split: "train" (200 images per class) or "test" (50 per class).
        size: Side of the result in pixels, at least 28.

    Shape:
        Returns images [N, size, size, 3] uint8 and labels [N] int64.
    """
    with np.load(FILE, allow_pickle=False) as arrays:
        grey, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    before = (size - grey.shape[1]) // 2
    after = size - grey.shape[1] - before
    padded = np.pad(grey, ((0, 0), (before, after), (before, after)))
    return np.repeat(padded[..., None], 3, axis=3), labels.astype(np.int64)


@DATASETS.register_module()
class FashionMNISTMiniDataset(LabelledDataset):
    """Embedded cut of Fashion-MNIST: 10 classes, 2000 training and 500 test images.

    The grey 28 x 28 images are padded with black to 32 x 32 and repeated to three channels, so that
    any configuration for CIFAR runs on them. Licence: MIT (Zalando SE), text beside the file.

    Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST", arXiv:1708.07747; the first images of each
    class.

    Args:
        split: "train" or "test".
        pipeline: Transforms, as configs or callables, applied in order.
        subset: Use only this many images, the same share of every class. None uses all.
        subset_seed: Seed of the draw of the subset.
        metainfo: Extra meta information; wins over that of the data set.
        test_mode: Whether a transform that gives up on an image is an error instead of a redraw.
        indices: Use the first `indices` rows, or these rows, as in MMEngine.
        lazy_init: Read the file at first use instead of now.
        data_root: Not used; the set lies in the package.
    """

    METAINFO = {"classes": FASHION_MNIST_CLASSES}

    images: np.ndarray

    def load_samples(self) -> None:
        """Read the embedded file."""
        self.images, self.labels = load_embedded(self.split)

    def read_sample(self, row: int) -> dict[str, Any]:
        """Return a writable copy of one image.

        Args:
            row: Row in `labels`.
        """
        return {"img": self.images[row].copy(), "img_shape": (32, 32), "ori_shape": (32, 32)}
