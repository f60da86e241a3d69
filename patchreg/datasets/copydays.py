"""Copydays: holiday photos and their edited copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from patchreg.datasets.image_files import _FileDataset, images_below
from patchreg.registry import DATASETS
from patchreg.utils.errors import ConfigError, DataError, MissingFileError

QUALITIES = (3, 5, 8, 10, 15, 20, 30, 50, 75)
CROPS = (10, 15, 20, 30, 40, 50, 60, 70, 80)
BLOCKS = (
    "original",
    "strong",
    *(f"jpegqual/{quality}" for quality in QUALITIES),
    *(f"crops/{share}" for share in CROPS),
)
"""Kinds of copies, in the order in which they are scored."""


@DATASETS.register_module()
class CopydaysDataset(_FileDataset):
    """Originals and copies of Copydays: `<data_root>/{original,strong,jpegqual/*,crops/*}/*.jpg`.

    The label of an image is the number of its original, in sorted order: strong copies share the
    first four characters of its name, the others its place. `metainfo` holds `block_names` and
    `block_of`, for `CopyDetectionMetric`.

    Source:
        Douze et al., "Evaluation of GIST descriptors for web-scale image search" (CIVR 2009).

    Args:
        data_root: Folder of the blocks.
        blocks: Blocks to use, in order; None uses all 20.
        pipeline: Transforms, as configs or callables, applied in order; start with `LoadImage`.
        test_mode: Whether a transform that gives up on an image is an error instead of a redraw.
        lazy_init: Look for the files at first use instead of now.

    Raises:
        MissingFileError: A block is missing; the text shows the layout.
        DataError: A block has another number of images, or a strong copy has no original.
        ConfigError: A block is unknown.

    Differs from official:
        Endings are known in upper and lower case.
    """

    SPLITS: tuple[str, ...] = ()

    def __init__(
        self,
        data_root: str,
        blocks: Sequence[str] | None = None,
        pipeline: Sequence[dict | Callable] = (),
        test_mode: bool = False,
        lazy_init: bool = False,
    ) -> None:
        self.blocks = tuple(BLOCKS if blocks is None else blocks)
        unknown = [name for name in self.blocks if name not in BLOCKS]
        if unknown:
            raise ConfigError(f"Copydays has no block '{unknown[0]}'; use some of {BLOCKS}")
        super().__init__(
            data_root=data_root,
            split="",
            pipeline=pipeline,
            test_mode=test_mode,
            lazy_init=lazy_init,
        )

    def load_samples(self) -> None:
        """Look for the files of all blocks."""
        originals = self._images("original")
        stems = {name[:4]: number for number, name in enumerate(originals)}
        paths: list[str] = []
        labels: list[int] = []
        block_of: list[int] = []
        for number, block in enumerate(self.blocks):
            names = self._images(block)
            if block == "strong":
                without = next((name for name in names if name[:4] not in stems), None)
                if without is not None:
                    raise DataError(
                        f"Copydays: 'strong/{without}' has no original that begins with "
                        f"'{without[:4]}'"
                    )
                labels += [stems[name[:4]] for name in names]
            elif len(names) != len(originals):
                raise DataError(
                    f"Copydays: block '{block}' has {len(names)} images, but there are "
                    f"{len(originals)} originals; they are matched by place, so restore the block"
                )
            else:
                labels += range(len(names))
            paths += [f"{block}/{name}" for name in names]
            block_of += [number] * len(names)
        self._metainfo["block_names"] = [name.replace("/", "_") for name in self.blocks]
        self._metainfo["block_of"] = block_of
        self.set_samples(paths, labels)
        self.set_classes(originals)
        self.check_labels(f"'{self.data_root}'")

    def _images(self, block: str) -> list[str]:
        folder = Path(self.data_root, block)
        names = list(images_below(str(folder))) if folder.is_dir() else []
        if not names:
            raise MissingFileError(
                f"Copydays: block '{folder}' has no images. Expected {self.data_root}/original/, "
                "strong/, jpegqual/{3,5,8,10,15,20,30,50,75}/ and "
                "crops/{10,15,20,30,40,50,60,70,80}/, as published with INRIA's Holidays data set"
            )
        return names
