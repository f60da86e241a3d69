"""The pixels themselves as features: what a learned backbone has to beat."""

from __future__ import annotations

from mmengine.model import BaseModule
from torch import Tensor

from patchreg.models.base import TokenFeatures
from patchreg.registry import BACKBONES


@BACKBONES.register_module()
class PixelBackbone(BaseModule):
    """Return each image as one token that holds its preprocessed pixels.

    Args:
        init_cfg: As in MMEngine; there are no weights.
    """

    def __init__(self, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)

    def forward(self, images: Tensor) -> TokenFeatures:
        """Flatten images.

        Args:
            images: Preprocessed images.

        Shape:
            images [B, C, H, W]; tokens [B, 1, C * H * W].
        """
        return TokenFeatures(tokens=images.flatten(1).unsqueeze(1), grid=(1, 1), extra=0)
