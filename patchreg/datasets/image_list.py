"""Images without labels, in any folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from patchreg.datasets.image_files import _FileDataset, images_below
from patchreg.registry import DATASETS
from patchreg.utils.errors import MissingFileError


@DATASETS.register_module()
class UnlabelledImageDataset(_FileDataset):
    """All images below a folder, sorted by name; the label of each is its own number.

    Args:
        data_root: Folder; sub-folders are searched too.
        pipeline: Transforms, as configs or callables, applied in order; start with `LoadImage`.
        subset: Use only this many images, drawn once. None uses all.
        subset_seed: Seed of the draw of the subset.
        metainfo: Extra meta information; wins over that of the data set.
        test_mode: Whether a transform that gives up on an image is an error instead of a redraw.
        indices: Use the first `indices` rows, or these rows, as in MMEngine.
        lazy_init: Look for the files at first use instead of now.

    Raises:
        MissingFileError: The folder does not exist.
        DataError: There is no image in it.
    """

    SPLITS: tuple[str, ...] = ()

    def __init__(
        self,
        data_root: str,
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
        """Look for the files."""
        if not os.path.isdir(self.data_root):
            raise MissingFileError(
                f"folder '{self.data_root}' does not exist; expected images in it or below it"
            )
        paths = list(images_below(self.data_root))
        self.set_samples(paths, range(len(paths)))
        self.set_classes(paths)
        self.check_labels(f"'{self.data_root}'")
