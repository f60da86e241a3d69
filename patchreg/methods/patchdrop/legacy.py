"""The policy network for 224 px of the first public version: a ResNet-10 on halved images."""

from __future__ import annotations

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor

from patchreg.models.backbones.cifar_resnet import map_features
from patchreg.models.base import TokenFeatures
from patchreg.models.macs import conv_macs
from patchreg.registry import BACKBONES
from patchreg.utils.errors import ConfigError


@BACKBONES.register_module()
class PatchDropResNet10Backbone(BaseModule):
    """ResNet with one basic block per stage, behind a 2x2 mean pooling of the image.

    Source:
        `Policy224` of the first public version of the PatchDrop repository (September 2019).

    Args:
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: torchvision is not installed.

    Differs from official:
        The head's pooling is global instead of a window of 4 cells, so every image size works.
    """

    def __init__(self, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        try:
            from torchvision.models.resnet import BasicBlock, ResNet
        except ImportError as error:
            raise ConfigError(
                "PatchDropResNet10Backbone needs torchvision: pip install torchvision"
            ) from error
        self.model = ResNet(BasicBlock, [1, 1, 1, 1])
        del self.model.avgpool, self.model.fc
        self._macs: dict[tuple[int, ...], float] = {}

    def macs(self, shape: tuple[int, ...]) -> float:
        """Count the multiply-accumulates for one image.

        Args:
            shape: Channels, height and width of the image.
        """
        if shape not in self._macs:
            channels, height, width = shape
            halved = (channels, height // 2, width // 2)
            self._macs[shape] = conv_macs(_Layers(self.model), halved)
        return self._macs[shape]

    def forward(self, images: Tensor) -> TokenFeatures:
        """Run the network up to its last feature map.

        Args:
            images: Preprocessed images.

        Shape:
            images [B, 3, H, W]; tokens [B, h * w, 512].
        """
        found = _layers(self.model, F.avg_pool2d(images, 2))
        return map_features(found, self.macs(tuple(images.shape[1:])))


class _Layers(BaseModule):
    def __init__(self, model: BaseModule) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return _layers(self.model, images)


def _layers(model: BaseModule, x: Tensor) -> Tensor:
    for part in model.children():
        x = part(x)
    return x
