"""The AnchorNet trunk: a small network without padding, so that each cell sees one exact window.

Letters: B images, H x W image, h x w cells, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from patchreg.models.base import TokenFeatures, map_features
from patchreg.models.macs import CountedMacs
from patchreg.registry import BACKBONES
from patchreg.utils.errors import ConfigError, DataError

OFFICIAL_BLOCKS = (
    (1, 16, 2),
    (3, 24, 2),
    (4, 24, 1),
    (4, 48, 1),
    (2, 96, 1),
    (1.5, 96, 1),
    (1.5, 96, 1),
)
"""Expansion ratio, output channels and stride of the published blocks."""


@dataclass(frozen=True)
class Window:
    """Where in an image the cells of a feature map look.

    Cell (i, j) looks at rows `i * stride` to `i * stride + side` (exclusive), columns alike.

    Source:
        Section 3.1 of the paper (receptive field without padding).

    Args:
        side: Side of the square window in px.
        stride: Distance of neighbouring windows in px.
    """

    side: int
    stride: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of windows inside an image; what is left over is never seen.

        Args:
            height: Height in px.
            width: Width in px.

        Raises:
            DataError: The image is smaller than one window.
        """
        if min(height, width) < self.side:
            raise DataError(
                f"an image of {height} x {width} px is smaller than one window of {self.side} x "
                f"{self.side} px; resize the images to at least {self.side} px on the shorter side, or "
                "use a trunk with fewer blocks"
            )
        return (height - self.side) // self.stride + 1, (width - self.side) // self.stride + 1


class _Squeeze(nn.Module):
    """Squeeze-and-excitation gate; its width follows the input of the block, not the expansion."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.se1 = nn.Conv2d(channels, squeezed, 1)
        self.se2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.se2(F.silu(self.se1(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class _Bottleneck(nn.Module):
    """Inverted bottleneck without padding; the skip keeps the top left part of its input."""

    def __init__(self, in_channels: int, ratio: float, channels: int, stride: int) -> None:
        super().__init__()
        inner = int(ratio * in_channels)
        self.expands = ratio != 1
        if self.expands:
            self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.se = _Squeeze(inner, max(1, int(0.25 * in_channels)))
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.skips = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.silu(self.bn1(self.conv1(x))) if self.expands else x
        out = self.se(F.silu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        return out + x[..., :-2, :-2] if self.skips else out


@BACKBONES.register_module()
class AnchorNetBackbone(CountedMacs, BaseModule):
    """Trunk of AnchorNet; window and stride follow from its table of blocks.

    At 224 px the published table gives 17 x 17 cells of 512 channels, windows of 95 px every 8 px and
    60.5 M multiply-accumulates with the classifier. The gates of squeeze-and-excitation let the rest
    of the image scale the channels of a cell; the spatial path alone sees exactly its window.

    Source:
        Section 3.1 of the paper; `models/anchornet.py` of the official repository.

    Args:
        blocks: Expansion ratio, output channels and stride of each block. Fewer blocks see smaller
            windows, for smaller images.
        stem_channels: Channels of the first convolution.
        stem_stride: Stride of the first convolution.
        out_channels: Channels C of the feature map.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: The table of blocks cannot be used.

    Differs from official:
        The expansion of a block with ratio 1, which is never used there, is not built; the converter
        drops and re-creates it. Any table, image size and number of classes works.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[float]] = OFFICIAL_BLOCKS,
        stem_channels: int = 16,
        stem_stride: int = 2,
        out_channels: int = 512,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not blocks or any(len(block) != 3 or min(block) <= 0 for block in blocks):
            raise ConfigError(
                f"blocks={list(blocks)}: expected at least one (expansion ratio, channels, stride), "
                "all above 0"
            )
        self.conv1 = nn.Conv2d(3, stem_channels, 3, stem_stride, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        side, jump, width = 3, stem_stride, stem_channels
        layers = []
        for ratio, channels, stride in blocks:
            layers.append(_Bottleneck(width, ratio, int(channels), int(stride)))
            side, jump, width = side + 2 * jump, jump * int(stride), int(channels)
        self.bneck = nn.Sequential(*layers)
        self.exp_conv = nn.Conv2d(width, out_channels, 1)
        self.out_channels = out_channels
        self.window = Window(side, jump)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # As the official code, fan_out without regard to groups.
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def run(self, images: Tensor) -> Tensor:
        """Return the feature map.

        Args:
            images: Preprocessed images.

        Shape:
            images [B, 3, H, W]; returns [B, C, h, w].
        """
        return self.exp_conv(self.bneck(F.silu(self.bn1(self.conv1(images)))))

    def forward(self, images: Tensor) -> TokenFeatures:
        """Run the trunk.

        Args:
            images: Preprocessed images.

        Shape:
            images [B, 3, H, W]; tokens [B, h * w, C].

        Raises:
            DataError: The images are smaller than one window.
        """
        self.window.grid(images.shape[2], images.shape[3])
        return map_features(self.run(images), self.macs(tuple(images.shape[1:])))
