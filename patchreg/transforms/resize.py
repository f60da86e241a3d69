"""Scaling of images as the official retrieval scripts do it."""

from __future__ import annotations

from typing import Any

import numpy as np

from patchreg.registry import TRANSFORMS
from patchreg.utils.errors import ConfigError


@TRANSFORMS.register_module()
class ThumbnailResize:
    """Shrink an image so that it fits into a square, keeping its shape; smaller ones stay.

    Source:
        `PIL.Image.thumbnail` in DINO's `eval_image_retrieval.py`.

    Args:
        size: Side of the square in px.

    Raises:
        ConfigError: The side is below 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigError(f"ThumbnailResize: size={size}, expected at least 1 px")
        self.size = size

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Scale `img`.

        Args:
            results: Sample with `img`, uint8 RGB.
        """
        from PIL import Image

        image = Image.fromarray(results["img"])
        image.thumbnail((self.size, self.size), Image.Resampling.LANCZOS)
        results["img"] = np.array(image)
        results["img_shape"] = results["img"].shape[:2]
        return results

    def __repr__(self) -> str:
        return f"ThumbnailResize(size={self.size})"
