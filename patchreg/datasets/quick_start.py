"""CIFAR-10 where it was prepared, else the embedded set: what the quick configurations train on."""

from __future__ import annotations

from pathlib import Path

from patchreg.datasets.cifar import CIFAR10Dataset
from patchreg.datasets.fashion_mnist import FASHION_MNIST_CLASSES, load_embedded
from patchreg.registry import DATASETS

_announced: set[str] = set()


@DATASETS.register_module()
class QuickStartDataset(CIFAR10Dataset):
    """CIFAR-10 when it lies under `data_root`, else the embedded cut of Fashion-MNIST.

    A log line says once which of the two it is.
    Both have 10 classes and give 32 x 32 RGB images; `metainfo["classes"]` are those of the set in
    use. Files that are there but damaged are an error, not a reason to fall back.

    Args:
        data_root: Folder in which CIFAR-10 is looked for, in the layouts of `CIFAR10Dataset`.
        split: "train" or "test".
        pipeline: Transforms, as configs or callables, applied in order.
        subset: Use at most this many images, the same share of every class. None uses all.
        subset_seed: Seed of the draw of the subset.
        metainfo: Extra meta information; wins over that of the data set.
        test_mode: Whether a transform that gives up on an image is an error instead of a redraw.
        indices: Use the first `indices` rows, or these rows, as in MMEngine.
        lazy_init: Read the files at first use instead of now.
    """

    # Known only once the files were looked for.
    METAINFO = {}

    def load_samples(self) -> None:
        """Read CIFAR-10 or the embedded set."""
        found = self.find_arrays(Path(self.data_root))
        if found is not None:
            self.images, self.labels = found
            self.set_classes(CIFAR10Dataset.METAINFO["classes"])
            self._announce(f"data: CIFAR-10 from '{self.data_root}'")
        else:
            self.images, self.labels = load_embedded(self.split)
            self.set_classes(FASHION_MNIST_CLASSES)
            self._announce(
                f"data: CIFAR-10 is not under '{self.data_root}', so the embedded cut of "
                "Fashion-MNIST is used (2000 training, 500 test images; accuracies are not "
                "comparable). For CIFAR-10 run: python tools/prepare_data.py cifar10 --out "
                f"{Path(self.data_root).parent}"
            )
        self.check_labels(f"the data under '{self.data_root}'")
        if self.subset is not None:
            self.subset = min(self.subset, len(self.labels))

    def _announce(self, text: str) -> None:
        if text not in _announced:
            _announced.add(text)
            self.note(text)
