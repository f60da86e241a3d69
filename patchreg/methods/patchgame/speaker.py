"""The speaker: which patches matter, and a symbol for each.

Letters: B images, P patches in raster order, D width of a symbol embedding, L symbols per patch, V
vocabulary, C channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.func import functional_call

from patchreg.models.base import TokenFeatures
from patchreg.models.layers import resize_pos_embed
from patchreg.models.macs import conv_macs
from patchreg.models.selectors.rank import RankSelector, gumbel_noise
from patchreg.registry import BACKBONES, MODELS
from patchreg.utils.errors import ConfigError, DataError
from patchreg.utils.random import batch_random

STRIDES = (16, 32)


@BACKBONES.register_module()
class PatchGameResNetBackbone(BaseModule):
    """ResNet of one BasicBlock per stage, without pooling and classifier: the rank network.

    Source:
        `Speaker` of the official `patchgame.py`; torchvision's `ResNet`.

    Args:
        stride: Pixels per cell, 32 or 16. 16 leaves out the stride of the last stage; since that has one
            block, nothing is dilated.
        init_cfg: Weights to load, as in MMEngine.

    Shape:
        Images [B, 3, H, W] become a map [B, 512, H / stride, W / stride].

    Raises:
        ConfigError: Another stride, or torchvision is not installed.
    """

    def __init__(self, stride: int = 32, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        if stride not in STRIDES:
            raise ConfigError(
                f"stride={stride}: the convolutional rank network has patches of {STRIDES} px; for other "
                "sizes use a VisionTransformerBackbone as ranker"
            )
        try:
            from torchvision.models.resnet import BasicBlock, ResNet
        except ImportError as error:
            raise ConfigError(
                "the rank network needs torchvision: pip install torchvision"
            ) from error
        self.stride = stride
        self.model = ResNet(
            BasicBlock, [1, 1, 1, 1], replace_stride_with_dilation=[False, False, stride == 16]
        )
        del self.model.avgpool, self.model.fc

    def forward(self, images: Tensor) -> Tensor:
        """Return the last feature map.

        Args:
            images: Preprocessed images.
        """
        for part in self.model.children():
            images = part(images)
        return images

    def macs(self, shape: tuple[int, ...]) -> float:
        """Count the multiply-accumulates of the convolutions for one image.

        Args:
            shape: Channels, height and width of the image.
        """
        return conv_macs(self, shape)


def patch_features(output: Tensor | TokenFeatures) -> tuple[Tensor, tuple[int, int]]:
    """Return the features of the patches and their grid, whatever kind of backbone gave them.

    Args:
        output: A map, or tokens with their grid.

    Shape:
        output [B, C, rows, columns] or tokens [B, E + P, C]; returns [B, P, C].
    """
    if isinstance(output, TokenFeatures):
        return output.tokens[:, output.extra :], output.grid
    return output.flatten(2).transpose(1, 2), (output.shape[2], output.shape[3])


def probe(backbone: nn.Module, img_size: int) -> Any:
    """Return what a backbone gives for an image, on the meta device: nothing is computed.

    Args:
        backbone: Backbone of images.
        img_size: Side of the image in px.
    """
    state: dict[str, Any] = {
        name: value.detach().to("meta")
        for name, value in (*backbone.named_parameters(), *backbone.named_buffers())
    }
    training = {layer: layer.training for layer in backbone.modules()}
    try:
        backbone.eval()
        with torch.no_grad():
            images = torch.zeros((1, 3, img_size, img_size), device="meta")
            return functional_call(backbone, state, (images,))
    finally:
        for layer, mode in training.items():
            layer.training = mode


def backbone_macs(backbone: Any, images: Tensor, grid: tuple[int, int]) -> float:
    """Count the multiply-accumulates of a ViT or a convolutional network for one image.

    Args:
        backbone: The network.
        images: Images it gets.
        grid: Its grid of patches.

    Shape:
        images [B, 3, H, W].
    """
    if hasattr(backbone, "matmul_macs"):
        return backbone.matmul_macs(grid)
    return backbone.macs(tuple(images.shape[1:]))


class PatchGameSpeaker(nn.Module):
    """Rank network and symbol network over the same patches.

    Parameter names are the official ones: `patch_rank`, `ranker.1`, `patch_symbol`, `lin_symbol.0`,
    `pe_symbol`.

    Source:
        `Speaker` of the official `patchgame.py`.

    Args:
        ranker: Config of the backbone that ranks; one feature per patch.
        selector: Config of a `RankSelector`.
        symbol: Config of a ViT over the whole image, or None for a convolution that sees one patch at a
            time.
        img_size: Side of the training images in px.
        patch_size: Side of a patch in px.
        hidden_dim: Width D of a symbol embedding.
        drop_rate: Dropout in front of the ranker's last layer, in [0, 1).

    Raises:
        ConfigError: Patches, ranker and symbol network do not fit together.

    Differs from official:
        Misfits are found here instead of later in the forward; without context other image sizes work
        too.
    """

    def __init__(
        self,
        ranker: dict,
        selector: dict,
        symbol: dict | None,
        img_size: int,
        patch_size: int,
        hidden_dim: int,
        drop_rate: float,
    ) -> None:
        super().__init__()
        if patch_size < 1 or img_size < patch_size or img_size % patch_size:
            raise ConfigError(f"img_size={img_size} is no multiple of patch_size={patch_size}")
        if not 0 <= drop_rate < 1:
            raise ConfigError(f"drop_rate={drop_rate} is outside [0, 1); 0.1 is usual")
        side = img_size // patch_size
        self.grid = (side, side)
        self.drop_rate = drop_rate
        self.selector: RankSelector = MODELS.build(selector)
        self.pe_symbol = nn.Parameter(torch.zeros(1, side * side, hidden_dim), symbol is None)
        self.patch_rank = MODELS.build(ranker)
        channels = self._check("ranker", self.patch_rank, img_size, patch_size)
        # The official model has a Dropout first; here it is keyed by the step, see `score`.
        self.ranker = nn.Sequential(nn.Identity(), nn.Linear(channels, 1))
        self.channels = channels
        if symbol is None:
            self.patch_symbol: nn.Module = nn.Conv2d(3, hidden_dim, patch_size, patch_size)
            self.lin_symbol: nn.Module = nn.Identity()
        else:
            self.patch_symbol = MODELS.build(symbol)
            width = self._check("symbol", self.patch_symbol, img_size, patch_size)
            self.lin_symbol = nn.Sequential(nn.Linear(width, hidden_dim), nn.ReLU())
        for part in (self.patch_rank, self.patch_symbol):
            # Attended to, but not trained: the class token has no task here.
            for name in ("cls_token", "dist_token"):
                if hasattr(part, name):
                    getattr(part, name).requires_grad_(False)

    def _check(self, name: str, backbone: nn.Module, img_size: int, patch_size: int) -> int:
        features, grid = patch_features(probe(backbone, img_size))
        if grid != self.grid:
            raise ConfigError(
                f"{name}: {type(backbone).__name__} cuts {img_size} px into {grid[0]} x {grid[1]} cells, "
                f"patch_size={patch_size} into {self.grid[0]} x {self.grid[1]}; give it the same patches"
            )
        return features.shape[2]

    def score(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the importance of every patch and the grid; nothing else is computed.

        Args:
            images: Preprocessed images.

        Shape:
            images [B, 3, H, W]; returns [B, P].
        """
        features, grid = patch_features(self.patch_rank(images))
        if self.training and self.drop_rate:
            shape = (features.shape[1], features.shape[2])
            uniform = batch_random.uniform(len(features), shape, features.device)
            keep = (uniform >= self.drop_rate).to(features.dtype)
            features = features * keep / (1 - self.drop_rate)
        return self.ranker(features).squeeze(-1), grid

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the symbol embedding of every patch and the grid.

        Args:
            images: Preprocessed images.

        Shape:
            images [B, 3, H, W]; returns [B, P, D].
        """
        features, grid = patch_features(self.patch_symbol(images))
        if isinstance(self.patch_symbol, nn.Conv2d):
            return features + resize_pos_embed(self.pe_symbol, self.grid, grid), grid
        return self.lin_symbol(features), grid

    def forward(self, images: Tensor, uniform: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return symbol embedding, score, normalised score and weight of every patch.

        Args:
            images: Preprocessed images.
            uniform: Draws behind the selection, or None for none.

        Shape:
            images [B, 3, H, W]; uniform [B, P, 2]; returns [B, P, D] and three times [B, P].

        Raises:
            DataError: The two networks cut the images differently.
        """
        symbols, grid = self.embed(images)
        score, other = self.score(images)
        if grid != other:
            raise DataError(
                f"images of {images.shape[2]} x {images.shape[3]} px: the ranker has a grid of {other}, "
                f"the symbol network of {grid}; use sides that the patch size divides"
            )
        return (symbols, score, *self.selector(score, uniform))

    def rank_macs(self, images: Tensor, grid: tuple[int, int]) -> float:
        """Count the multiply-accumulates of `score` for one image.

        Args:
            images: Images it gets.
            grid: Their grid of patches.

        Shape:
            images [B, 3, H, W].
        """
        return backbone_macs(self.patch_rank, images, grid) + math.prod(grid) * self.channels


class PatchGameSymbols(nn.Module):
    """Draw symbols for each patch: Gumbel-softmax, one-hot with the gradient of the soft sample.

    Source:
        `GumbelWrapper` of the official `patchgame.py`.

    Args:
        in_dim: Width D of the embedding.
        vocab_size: V, at least 2.
        max_len: Symbols L per patch.
        hard: One-hot symbols; otherwise the soft sample is the symbol.
        temperature: Of the softmax, where none is scheduled.
        trainable_temperature: Train the temperature, from `temperature` on, instead of scheduling it.

    Raises:
        ConfigError: An argument is out of its range.

    Differs from official:
        A trainable temperature is used; there it never got a gradient.
    """

    def __init__(
        self,
        in_dim: int,
        vocab_size: int,
        max_len: int,
        hard: bool,
        temperature: float,
        trainable_temperature: bool,
    ) -> None:
        super().__init__()
        if vocab_size < 2 or max_len < 1:
            raise ConfigError(
                f"vocab_size={vocab_size}, max_len={max_len}: expected at least 2 symbols in the "
                "vocabulary and 1 per patch"
            )
        check_temperature(temperature)
        self.shape = (max_len, vocab_size)
        self.hard = hard
        self.logits = nn.Linear(in_dim, vocab_size * max_len)
        if trainable_temperature:
            self.temperature: nn.Parameter | float = nn.Parameter(torch.tensor([temperature]))
        else:
            self.temperature = temperature

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature of the steps to come, unless it is trained.

        Args:
            temperature: Above 0.
        """
        if not isinstance(self.temperature, nn.Parameter):
            self.temperature = check_temperature(temperature)

    def forward(self, x: Tensor, uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits and the symbols.

        Args:
            x: Symbol embedding.
            uniform: Draws behind the noise, or None for the most probable symbols.

        Shape:
            x [B, P, D]; uniform [B, P, L, V]; returns [B, P, L * V] and [B, P, L, V].
        """
        logits = self.logits(x)
        noisy = logits.view(*logits.shape[:2], *self.shape)
        if uniform is not None:
            # Noise keeps its own type, so in mixed precision the sum is float32.
            noisy = noisy + gumbel_noise(uniform)
        soft = (noisy / self.temperature).softmax(dim=-1)
        if not self.hard:
            return logits, soft
        sharp = F.one_hot(soft.argmax(dim=-1), self.shape[1]).to(soft.dtype)
        return logits, (sharp - soft).detach() + soft


def check_temperature(temperature: float) -> float:
    """Return a temperature that is above 0.

    Args:
        temperature: The value.

    Raises:
        ConfigError: It is not above 0.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature}: expected a number above 0, such as 1.0")
    return float(temperature)
