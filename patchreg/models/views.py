"""Views of an image at another resolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.registry import MODELS
from patchreg.utils.errors import ConfigError, DataError


@MODELS.register_module()
class LowResolutionViewPreprocessor(nn.Module):
    """Scale normalised images down, as a cheap overview of the scene.

    `nearest` takes the pixel at floor(i * in / out) of each axis: it aliases, as the official code
    does. `area` and `bilinear` average (the latter with antialiasing).

    Source:
        Every `interpolate` call of the PatchDrop repository.

    Args:
        size: Height and width in px of the view.
        mode: `nearest`, `area` or `bilinear`.
        enlarge_to: Height and width in px to which the view is enlarged again by `nearest`, or
            None. The policy network of the first public version saw it so.

    Raises:
        ConfigError: A size is not positive, or the mode is unknown.
    """

    def __init__(self, size: int, mode: str = "nearest", enlarge_to: int | None = None) -> None:
        super().__init__()
        if size < 1 or (enlarge_to is not None and enlarge_to < size):
            raise ConfigError(
                f"size={size}, enlarge_to={enlarge_to}: expected 1 <= size <= enlarge_to (or None)"
            )
        if mode not in ("nearest", "area", "bilinear"):
            raise ConfigError(f"mode={mode!r} is unknown; use 'nearest', 'area' or 'bilinear'")
        self.size = size
        self.mode = mode
        self.enlarge_to = enlarge_to

    def forward(self, images: Tensor) -> Tensor:
        """Return the view; at the view's own size the image itself.

        Args:
            images: Normalised images, at least as large as the view.

        Shape:
            images [B, C, H, W]; returns [B, C, size, size], or the enlarged size.

        Raises:
            DataError: The images are smaller than the view.
        """
        height, width = images.shape[2:]
        if min(height, width) < self.size:
            raise DataError(
                f"images of {height} x {width} px are smaller than the low-resolution view of "
                f"{self.size} px; lower its size, or feed larger images"
            )
        if (height, width) != (self.size, self.size):
            options = {"antialias": True, "align_corners": False} if self.mode == "bilinear" else {}
            images = F.interpolate(images, (self.size, self.size), mode=self.mode, **options)
        if self.enlarge_to is not None and self.enlarge_to != self.size:
            images = F.interpolate(images, (self.enlarge_to, self.enlarge_to), mode="nearest")
        return images
