"""Edited copies of real photos: a copy-detection benchmark that runs anywhere.

Every copy is edited two or three times, so that networks trained on ImageNet do not solve it, and photos
are pasted on hosts that are in no database.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patchreg.datasets.image_files import _FileDataset, images_below
from patchreg.registry import DATASETS
from patchreg.transforms.loading import LoadImage
from patchreg.utils.errors import ConfigError, DataError, MissingFileError

if TYPE_CHECKING:
    from PIL import Image

HOST_SIDE = 240  # px of a host, twice the side of a photo


def crop(image: Image.Image, random: np.random.Generator, low: float, high: float) -> Image.Image:
    """Cut out a rectangle and scale it to the size of the image.

    Args:
        image: Image.
        random: Source of the draws.
        low: Smallest share of the area.
        high: Largest share of the area.
    """
    width, height = image.size
    area, ratio = random.uniform(low, high), np.exp(random.uniform(-0.3, 0.3))
    wide = min(width, round(width * (area * ratio) ** 0.5))
    tall = min(height, round(height * (area / ratio) ** 0.5))
    left, top = random.integers(width - wide + 1), random.integers(height - tall + 1)
    return image.resize((width, height), box=(left, top, left + wide, top + tall))


def jpeg(image: Image.Image, random: np.random.Generator, low: int, high: int) -> Image.Image:
    """Compress and decompress.

    Args:
        image: Image.
        random: Source of the draws.
        low: Lowest quality.
        high: Highest quality.
    """
    from PIL import Image

    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(random.integers(low, high + 1)))
    return Image.open(file).convert("RGB")


def rotate(image: Image.Image, random: np.random.Generator, low: float, high: float) -> Image.Image:
    """Turn to either side; corners become black.

    Args:
        image: Image.
        random: Source of the draws.
        low: Smallest angle in degrees.
        high: Largest angle in degrees.
    """
    from PIL import Image

    angle = random.uniform(low, high) * random.choice((-1, 1))
    return image.rotate(float(angle), Image.Resampling.BICUBIC)


def paste(
    image: Image.Image, random: np.random.Generator, host: Image.Image, low: float, high: float
) -> Image.Image:
    """Paste at any place of a host.

    Args:
        image: Image.
        random: Source of the draws.
        host: Host; a square is cut out of it.
        low: Smallest side of the image relative to that of the host.
        high: Largest side.
    """
    square = min(host.size)
    left, top = (int(random.integers(side - square + 1)) for side in host.size)
    canvas = host.resize((HOST_SIDE, HOST_SIDE), box=(left, top, left + square, top + square))
    side = round(HOST_SIDE * random.uniform(low, high))
    left, top = (int(x) for x in random.integers(HOST_SIDE - side + 1, size=2))
    canvas.paste(image.resize((side, side)), (left, top))
    return canvas


def mirror(image: Image.Image) -> Image.Image:
    """Mirror left to right.

    Args:
        image: Image.
    """
    from PIL import Image

    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def recolour(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation by up to a half each.

    Args:
        image: Image.
        random: Source of the draws.
    """
    from PIL import ImageEnhance

    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = kind(image).enhance(float(random.uniform(0.5, 1.5)))
    return image


def crop_jpeg(image: Image.Image, host: Image.Image, random: np.random.Generator) -> Image.Image:
    """Keep 10 to 25 % of the area, then JPEG quality 5 to 15.

    Args:
        image: Photo.
        host: Not used.
        random: Source of the draws.
    """
    return jpeg(crop(image, random, 0.1, 0.25), random, 5, 15)


def rotate_crop_grey(
    image: Image.Image, host: Image.Image, random: np.random.Generator
) -> Image.Image:
    """Turn by 20 to 70 degrees, keep 25 to 45 % of the area, take the colour out.

    Args:
        image: Photo.
        host: Not used.
        random: Source of the draws.
    """
    image = crop(rotate(image, random, 20, 70), random, 0.25, 0.45)
    return image.convert("L").convert("RGB")


def mirror_blur_recolour(
    image: Image.Image, host: Image.Image, random: np.random.Generator
) -> Image.Image:
    """Mirror, blur by a radius of 2 to 4 px, change the colours.

    Args:
        image: Photo.
        host: Not used.
        random: Source of the draws.
    """
    from PIL import ImageFilter

    radius = float(random.uniform(2, 4))
    return recolour(mirror(image).filter(ImageFilter.GaussianBlur(radius)), random)


def paste_jpeg(image: Image.Image, host: Image.Image, random: np.random.Generator) -> Image.Image:
    """Paste at 45 to 65 % of the host's side, then JPEG quality 10 to 30.

    Args:
        image: Photo.
        host: Host.
        random: Source of the draws.
    """
    return jpeg(paste(image, random, host, 0.45, 0.65), random, 10, 30)


def crop_mirror_paste(
    image: Image.Image, host: Image.Image, random: np.random.Generator
) -> Image.Image:
    """Keep 40 to 70 % of the area, mirror, paste at 50 to 70 % of the host's side.

    Args:
        image: Photo.
        host: Host.
        random: Source of the draws.
    """
    return paste(mirror(crop(image, random, 0.4, 0.7)), random, host, 0.5, 0.7)


EDITS: dict[str, Callable[..., Image.Image]] = {
    edit.__name__: edit
    for edit in (crop_jpeg, rotate_crop_grey, mirror_blur_recolour, paste_jpeg, crop_mirror_paste)
}
"""Stacked edits by name: (photo, host, draws) -> copy."""


@DATASETS.register_module()
class PhotoCopiesDataset(_FileDataset):
    """Photos of a folder (`database`), or seeded edited copies of some of them (`query`).

    The label of an image is the number of the photo it shows. Copies depend on the seed, the photo
    and the edit alone. `metainfo` of the copies holds `block_names` and `block_of`, for
    `CopyDetectionMetric`.

    Args:
        data_root: Folder of photos, such as that of `tools/prepare_data.py open_images`.
        split: "database" or "query".
        hosts_root: Folder of hosts that are not among the photos, such as that of
            `tools/prepare_data.py scratch_backgrounds`; needed for copies.
        edits: Stacked edits, see `EDITS`; None uses all.
        count: Photos that are edited, drawn once by the seed.
        seed: Seed of photos and edits.
        pipeline: Transforms, as configs or callables, applied in order; start with `LoadImage`.
        test_mode: Whether a transform that gives up on an image is an error instead of a redraw.
        lazy_init: Look for the files at first use instead of now.

    Raises:
        MissingFileError: A folder does not exist; the text says how to get it.
        DataError: There are fewer photos than asked for, or no hosts.
        ConfigError: An edit is unknown.
    """

    SPLITS = ("database", "query")

    def __init__(
        self,
        data_root: str,
        split: str = "database",
        hosts_root: str | None = None,
        edits: Sequence[str] | None = None,
        count: int = 300,
        seed: int = 0,
        pipeline: Sequence[dict | Callable] = (),
        test_mode: bool = False,
        lazy_init: bool = False,
    ) -> None:
        self.edits = tuple(EDITS if edits is None else edits)
        unknown = [name for name in self.edits if name not in EDITS]
        if unknown or not self.edits:
            raise ConfigError(f"edits={self.edits}: expected some of {tuple(EDITS)}")
        self.hosts_root = hosts_root
        self.hosts: list[str] = []
        self.count = count
        self.seed = seed
        super().__init__(
            data_root=data_root,
            split=split,
            pipeline=pipeline,
            test_mode=test_mode,
            lazy_init=lazy_init,
        )

    def load_samples(self) -> None:
        """Look for the files, and choose the photos that are edited."""
        photos = self._images(self.data_root, "open_images")
        self.set_classes(photos)
        if self.split == "database":
            self.set_samples(photos, range(len(photos)))
            return
        if self.count > len(photos):
            raise DataError(
                f"count={self.count} is more than the {len(photos)} photos in '{self.data_root}'"
            )
        self.hosts = self._images(self.hosts_root or "", "scratch_backgrounds")
        chosen = np.random.default_rng(self.seed).permutation(len(photos))[: self.count]
        labels = np.tile(np.sort(chosen), len(self.edits))
        self.set_samples([photos[label] for label in labels], labels.tolist())
        self._metainfo["block_names"] = list(self.edits)
        self._metainfo["block_of"] = np.repeat(np.arange(len(self.edits)), self.count).tolist()

    def _images(self, folder: str, name: str) -> list[str]:
        found = list(images_below(folder)) if folder and Path(folder).is_dir() else []
        if not found:
            raise MissingFileError(
                f"there are no images in '{folder}'; get them with: python tools/prepare_data.py {name}"
            )
        return found

    def read_sample(self, row: int) -> dict[str, Any]:
        """Return the path of a photo, or an edited copy as pixels.

        Args:
            row: Row in `labels`.
        """
        info = super().read_sample(row)
        if self.split == "query":
            info["img"] = self.copy(info["img_path"], row)
            info["edit"] = f"{self.edits[row // self.count]}, seed {self.seed}"
        return info

    def copy(self, path: str, row: int) -> np.ndarray:
        """Edit one photo.

        Args:
            path: Its file.
            row: Row in `labels`.

        Shape:
            Returns [H, W, 3] uint8 RGB.
        """
        from PIL import Image

        edit = EDITS[self.edits[row // self.count]]
        key = sorted(EDITS).index(edit.__name__)
        random = np.random.default_rng((self.seed, int(self.labels[row]), key))
        read = LoadImage().read
        host = read(str(Path(self.hosts_root or "", self.hosts[random.integers(len(self.hosts))])))
        return np.array(edit(Image.fromarray(read(path)), Image.fromarray(host), random))
