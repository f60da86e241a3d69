"""Residual networks for images of CIFAR's size: the wide and the thin family.

Letters: B images, H x W input, h x w last feature map, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from patchreg.models.base import TokenFeatures, map_features
from patchreg.models.macs import CountedMacs
from patchreg.registry import BACKBONES
from patchreg.utils.errors import ConfigError


class _ConvBackbone(CountedMacs, BaseModule):
    """Common part of both families: feature map to tokens, cost per input size."""

    def forward(self, images: Tensor) -> TokenFeatures:
        """Run the network up to its last feature map; a head pools it.

        Args:
            images: Preprocessed images of any size.

        Shape:
            images [B, 3, H, W]; tokens [B, h * w, C].
        """
        if torch.is_autocast_enabled(images.device.type):
            # Half-precision convolutions are faster in this layout. In float32 it is left alone:
            # other rounding flips units next to zero, whose gradients are then not the official ones.
            images = images.contiguous(memory_format=torch.channels_last)
        return map_features(self.run(images), self.macs(tuple(images.shape[1:])))


class _WideBlock(nn.Module):
    """Basic block; its shortcut is a 1x1 convolution with BatchNorm where shapes change."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)).add_(self.shortcut(x)), inplace=True)


@BACKBONES.register_module()
class CIFARResNetBackbone(_ConvBackbone):
    """ResNet of ImageNet's widths with a 3x3 stem for 32-px images.

    Four stages of basic blocks with strides 1, 2, 2, 2 and 1, 2, 4, 8 times the base width; no
    max-pooling. Weights start at PyTorch's defaults. Parameter names are those of the PatchDrop
    repository.

    Source:
        `models/resnet_cifar.py` of the PatchDrop repository (`R32_C10`: blocks 3, 4, 6, 3).

    Args:
        num_blocks: Blocks per stage.
        base_channels: Channels of the first stage.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: There are not four stages of at least one block.

    Differs from official:
        Any input size works: the pooling of the head is global instead of a window named by a
        string.
    """

    def __init__(
        self,
        num_blocks: Sequence[int] = (3, 4, 6, 3),
        base_channels: int = 64,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if len(num_blocks) != 4 or min(num_blocks) < 1:
            raise ConfigError(
                f"num_blocks={tuple(num_blocks)}: expected four stages of at least one block"
            )
        self.conv1 = nn.Conv2d(3, base_channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(base_channels)
        width = base_channels
        for stage, blocks in enumerate(num_blocks):
            channels = base_channels * 2**stage
            layers: list[nn.Module] = []
            for block in range(blocks):
                stride = 2 if block == 0 and stage > 0 else 1
                layers.append(_WideBlock(width, channels, stride))
                width = channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.out_channels = width

    def run(self, images: Tensor) -> Tensor:
        """Return the last feature map.

        Args:
            images: Preprocessed images.

        Shape:
            images [B, 3, H, W]; returns [B, 8 * base_channels, ceil(H / 8), ceil(W / 8)].
        """
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return x


class ZeroPadShortcut(nn.Module):
    """Shortcut without parameters: 2x2 mean pooling, then zero channels to double the width.

    Source:
        He et al. 2016, section 4.2 (option A), in the form of the PatchDrop repository's first
        version (mean pooling instead of striding).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Halve the size and double the channels.

        Args:
            x: Feature map.

        Shape:
            x [B, C, H, W]; returns [B, 2 * C, H // 2, W // 2].
        """
        pooled = F.avg_pool2d(x, 2)
        return torch.cat((pooled, torch.zeros_like(pooled)), dim=1)


class _ThinBlock(nn.Module):
    """Two convolutions with BatchNorm; the skip is added outside."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))


@BACKBONES.register_module()
class ThinCIFARResNetBackbone(_ConvBackbone):
    """ResNet of He et al. for CIFAR: three segments of 16, 32 and 64 channels, free shortcuts.

    Depth 32 has 0.46 M parameters with a head, depth 8 is PatchDrop's policy network. Parameter
    names are those of the PatchDrop repository's first version.

    Source:
        He et al. 2016, section 4.2; `ZeroPadShortcut` where the width doubles.

    Args:
        depth: 6 n + 2 layers for n blocks per segment, such as 8, 20, 32, 56.
        base_channels: Channels of the first segment.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: The depth is not 6 n + 2.
    """

    def __init__(
        self, depth: int = 32, base_channels: int = 16, init_cfg: dict | None = None
    ) -> None:
        super().__init__(init_cfg)
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ConfigError(f"depth={depth}: expected 6 n + 2, such as 8, 20, 32 or 56")
        self.conv1 = nn.Conv2d(3, base_channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(base_channels)
        self.shortcut = ZeroPadShortcut()
        self.per_segment = blocks
        width = base_channels
        segments = []
        for segment in range(3):
            channels = base_channels * 2**segment
            layers = []
            for block in range(blocks):
                layers.append(_ThinBlock(width, channels, 2 if segment and not block else 1))
                width = channels
            segments.append(nn.ModuleList(layers))
        self.blocks = nn.ModuleList(segments)
        self.out_channels = width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def run(self, images: Tensor) -> Tensor:
        """Return the last feature map.

        Args:
            images: Preprocessed images; height and width divisible by 4.

        Shape:
            images [B, 3, H, W]; returns [B, 4 * base_channels, H / 4, W / 4].
        """
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        for segment, blocks in enumerate(self.blocks):
            for number, block in enumerate(blocks.children()):
                skip = self.shortcut(x) if segment and not number else x
                x = F.relu(block(x).add_(skip), inplace=True)
        return x
