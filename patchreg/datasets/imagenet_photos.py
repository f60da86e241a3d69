"""Twenty labelled photos of ImageNet-1k classes: a check of converted weights within seconds."""

from __future__ import annotations

import re
from pathlib import Path

from patchreg.datasets.image_files import ImageNetDataset
from patchreg.registry import DATASETS
from patchreg.utils.errors import MissingFileError

_NAME = re.compile(r"imagenet_(\d+)_(\d+)\.jpg")


@DATASETS.register_module()
class ImageNetPhotosDataset(ImageNetDataset):
    """Photos called `imagenet_<number>_<label>.jpg`; labels are those of ImageNet-1k.

    Source: The samples of the package foolbox (Rauber et al. 2017).

    Args:
        data_root: Folder of the photos.
        split: Not used.
        pipeline: Transforms, as configs or callables, applied in order; start with `LoadImage`.
        subset: Use only this many images. None uses all.
        subset_seed: Seed of the draw of the subset.
        metainfo: Extra meta information; wins over that of the data set.
        test_mode: Whether a transform that gives up on an image is an error instead of a redraw.
        indices: Use the first `indices` rows, or these rows, as in MMEngine.
        lazy_init: Look for the files at first use instead of now.

    Raises:
        MissingFileError: There are no photos.
    """

    def load_samples(self) -> None:
        """Look for the photos."""
        found = sorted(
            (int(match[1]), int(match[2]), path.name)
            for path in Path(self.data_root).glob("*.jpg")
            if (match := _NAME.fullmatch(path.name))
        )
        if not found:
            raise MissingFileError(
                f"'{self.data_root}' holds no photos; fetch them with: python tools/prepare_data.py "
                f"imagenet_photos --out {Path(self.data_root).parent}"
            )
        self.set_samples([name for _, _, name in found], [label for _, label, _ in found])
        self.set_classes(self.class_names([str(label) for label in range(self.CLASS_COUNT)]))
        self.check_labels(f"'{self.data_root}'")
