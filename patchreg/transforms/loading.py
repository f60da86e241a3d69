"""Reading an image file as RGB, whatever its format, and saying which file is broken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from patchreg.registry import TRANSFORMS
from patchreg.utils.errors import DataError, MissingFileError

if TYPE_CHECKING:
    from PIL import Image


def to_rgb8(image: Image.Image) -> Image.Image:
    """Convert any image to 8-bit RGB.

    Transparency is dropped, not blended, as torchvision's loader does; 16-bit grey is scaled, not
    clipped.

    Args:
        image: Image in any mode.

    Raises:
        ValueError: The pixels are floating-point numbers, whose range nobody knows.
    """
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers; save it with 8 or 16 bits per channel"
        )
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.max(initial=0) > 255:
            grey = grey >> 8
        return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA"):
        # A palette with transparency given as bytes is only understood on the way to RGBA.
        image = image.convert("RGBA")
    return image.convert("RGB")


@TRANSFORMS.register_module()
class LoadImage:
    """Read `img_path` into `img`: uint8 RGB, height x width x 3.

    A sample that has `img` already passes unchanged.

    Differs from official:
        mmpretrain's `LoadImageFromFile` gives BGR, turns images by their EXIF tag and does not say
        what is wrong with a file. The EXIF tag is ignored by default here, as in the loaders of
        torchvision and timm that the published numbers come from; a damaged tag never matters.

    Args:
        apply_orientation: Turn the image as its EXIF tag says.
        max_pixels: Refuse images with more pixels before decoding them (a small file can decode to
            gigabytes).

    Raises:
        MissingFileError: The file does not exist.
        DataError: The file is truncated, is no image or is too large; the text names it.
    """

    def __init__(self, apply_orientation: bool = False, max_pixels: int = 100_000_000) -> None:
        self.apply_orientation = apply_orientation
        self.max_pixels = max_pixels

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Return the sample with `img`, `img_shape` and `ori_shape` (height, width).

        Args:
            results: Sample with `img_path`, or with `img`.
        """
        if "img" not in results:
            results["img"] = self.read(results["img_path"])
        results["img_shape"] = results["ori_shape"] = results["img"].shape[:2]
        return results

    def read(self, path: str) -> np.ndarray:
        """Read one file.

        Args:
            path: Image file.

        Shape:
            Returns [H, W, 3] uint8 RGB.
        """
        from PIL import Image

        try:
            with Image.open(path) as image:
                width, height = image.size
                if width * height > self.max_pixels:
                    raise DataError(
                        f"image '{path}' has {width} x {height} pixels, more than max_pixels="
                        f"{self.max_pixels}; scale it down or raise max_pixels of LoadImage"
                    )
                decoded = to_rgb8(self._turn(image))
                return np.array(decoded)
        except DataError:
            raise
        except FileNotFoundError as error:
            raise MissingFileError(
                f"image '{path}' does not exist; check data_root, or that the file was not moved"
            ) from error
        # Decoders fail with many classes, from OSError to struct.error and IndexError.
        except Exception as error:
            raise DataError(
                f"image '{path}' cannot be read ({type(error).__name__}: {error}); it is "
                "truncated, not an image or not supported: replace or remove it"
            ) from error

    def _turn(self, image: Image.Image) -> Image.Image:
        if not self.apply_orientation:
            return image
        from PIL import ImageOps

        try:
            return ImageOps.exif_transpose(image)
        except Exception:
            # A damaged tag says nothing about the pixels; whether those can be decoded shows next.
            return image

    def __repr__(self) -> str:
        return (
            f"LoadImage(apply_orientation={self.apply_orientation}, max_pixels={self.max_pixels})"
        )
