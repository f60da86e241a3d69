"""Pyramid vision transformer: four stages of ever coarser token grids.

Letters: B images, E extra tokens, H x W token grid of a stage, N = E + H * W tokens, C channels, h
heads, d = C / h, M keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from patchreg.models.base import TokenFeatures
from patchreg.models.layers import (
    Mlp,
    PatchEmbed,
    attend,
    check_heads,
    drop_path,
    drop_path_rates,
    hidden_width,
    init_transformer,
    resize_pos_embed,
)
from patchreg.registry import MODELS
from patchreg.utils.errors import ConfigError, DataError, did_you_mean
from patchreg.utils.random import batch_random

_COMMON = {"num_heads": (1, 2, 5, 8), "mlp_ratios": (8, 8, 4, 4), "sr_ratios": (8, 4, 2, 1)}
_WIDTHS = {"embed_dims": (64, 128, 320, 512), **_COMMON}
ARCHITECTURES: dict[str, dict[str, Sequence[int]]] = {
    "tiny": {"depths": (2, 2, 2, 2), **_WIDTHS},
    "small": {"depths": (3, 4, 6, 3), **_WIDTHS},
    "medium": {"depths": (3, 4, 18, 3), **_WIDTHS},
    "large": {"depths": (3, 8, 27, 3), **_WIDTHS},
    "huge_v2": {
        "depths": (3, 10, 60, 3),
        **_COMMON,
        "embed_dims": (128, 256, 512, 768),
        "num_heads": (2, 4, 8, 12),
    },
}
PATCH_SIZES = (4, 2, 2, 2)


class SpatialReductionAttention(nn.Module):
    """Attention whose keys and values come from a coarser grid than the queries.

    Source:
        "Pyramid Vision Transformer", section 3.3; `Attention` of vtpack's PVT.

    Args:
        dims: Channels C.
        num_heads: Heads; divides `dims`.
        qkv_bias: Bias of the query and key/value projections.
        drop_rate: Dropout after the output projection, in [0, 1).
        sr_ratio: Keys and values come from squares of this many tokens per side (only with E = 0);
            1 for none.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        sr_ratio: int = 1,
    ) -> None:
        super().__init__()
        self.num_heads = check_heads(dims, num_heads)
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dims, dims, bias=qkv_bias)
        self.kv = nn.Linear(dims, 2 * dims, bias=qkv_bias)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dims, dims, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dims)
        self.proj = nn.Linear(dims, dims)
        self.drop = nn.Dropout(drop_rate) if drop_rate else nn.Identity()

    def keys(self, source: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Project keys and values.

        Args:
            source: Normed tokens.
            grid: Their grid (H, W).

        Shape:
            source [B, N, C]; returns two tensors [B, h, M, d].
        """
        batch, _, dims = source.shape
        if self.sr_ratio > 1:
            pixels = source.transpose(1, 2).reshape(batch, dims, *grid)
            source = self.norm(self.sr(pixels).flatten(2).transpose(1, 2))
        heads = self.num_heads
        pair = self.kv(source).view(batch, source.shape[1], 2, heads, dims // heads)
        key, value = pair.permute(2, 0, 3, 1, 4).unbind(0)
        return key, value

    def forward(self, tokens: Tensor, keys: tuple[Tensor, Tensor]) -> Tensor:
        """Attend from tokens.

        Args:
            tokens: Normed query tokens.
            keys: Result of `keys`.

        Shape:
            tokens [B, Q, C]; returns the same.
        """
        query = self.q(tokens).unflatten(-1, (self.num_heads, keys[0].shape[-1]))
        out = attend(query.transpose(1, 2), *keys).transpose(1, 2).reshape(tokens.shape)
        return self.drop(self.proj(out))

    def macs(self, tokens: int) -> float:
        """Count the multiply-accumulates for one image.

        Args:
            tokens: Tokens N, all of them queries.
        """
        dims = self.proj.in_features
        keys = tokens / self.sr_ratio**2
        cost = 2 * tokens * dims**2 + 2 * keys * dims**2
        if self.sr_ratio > 1:
            cost += tokens * dims**2 + keys * dims
        return float(cost + 2 * tokens * keys * dims + 3 * tokens * keys * self.num_heads)


class PyramidBlock(nn.Module):
    """Pre-norm encoder block around any attention with `keys`, `forward` and `macs`.

    Args:
        dims: Channels C.
        attn: Attention, as `SpatialReductionAttention`.
        mlp_ratio: Width of the MLP relative to `dims`.
        drop_rate: Dropout in the MLP, in [0, 1).
        drop_path_rate: Probability of dropping a branch for an image, in [0, 1).
        norm_eps: Epsilon of the layer norms.
    """

    def __init__(
        self,
        dims: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(dims, eps=norm_eps)
        self.attn: Any = attn
        self.norm2 = nn.LayerNorm(dims, eps=norm_eps)
        self.mlp = Mlp(dims, hidden_width(dims, mlp_ratio), drop_rate)

    def forward(self, x: Tensor, grid: tuple[int, int], uniform: Tensor | None = None) -> Tensor:
        """Encode tokens.

        Args:
            x: Tokens, extra tokens first.
            grid: Token grid (H, W).
            uniform: Draws for the two branches, or None to keep both.

        Shape:
            x [B, N, C]; uniform [B, 2]; returns [B, N, C].
        """
        first, second = (None, None) if uniform is None else uniform.unbind(1)
        normed = self.norm1(x)
        attended = self.attn(normed, self.attn.keys(normed, grid))
        x = x + drop_path(attended, first, self.drop_path_rate)
        return x + drop_path(self.mlp(self.norm2(x)), second, self.drop_path_rate)

    def macs(self, tokens: int) -> float:
        """Count the multiply-accumulates for one image.

        Args:
            tokens: Tokens N.
        """
        dims, hidden = self.mlp.fc1.in_features, self.mlp.fc1.out_features
        return self.attn.macs(tokens) + tokens * (2.0 * dims + 2 * dims * hidden + hidden)


@MODELS.register_module()
class PyramidVisionTransformerBackbone(BaseModule):
    """PVT: an encoder with grids of stride 4, 8, 16 and 32, for a classifier or a detector.

    Parameter names are those of vtpack's PVT (`patch_embed1`, `pos_embed1`, `block1`, ...).

    Source:
        "Pyramid Vision Transformer" (ICCV 2021); the `pvt_*_256` models of vtpack.

    Args:
        arch: `tiny`, `small`, `medium`, `large`, `huge_v2`, or a dict with `depths`, `embed_dims`,
            `num_heads`, `mlp_ratios` and `sr_ratios`, each with one entry per stage.
        img_size: Side, or height and width, in px, that the position embeddings are made for.
        in_channels: Channels of the image.
        qkv_bias: Bias in the projections of the attention.
        cls_token: Put a class token in front of the last stage's grid.
        out_indices: Stages, from 0, whose maps are returned; with any, the final norm is left out,
            because a classifier is not meant.
        drop_rate: Dropout after the position embeddings, the projections and in the MLPs, in [0,
            1); drawn by each process on its own.
        drop_path_rate: Probability of dropping a branch in the last block, rising linearly from 0
            over the blocks of all stages, in [0, 1).
        norm_eps: Epsilon of the layer norms in the blocks and of the final one; those of patch
            embedding and spatial reduction have 1e-5.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: Unknown `arch`, stages or sizes that do not fit.

    Differs from official:
        Position embeddings are compared by height and width and resized in every stage, so that any
        size works that the strides divide.
    """

    def __init__(
        self,
        arch: str | dict = "tiny",
        img_size: int | Sequence[int] = 256,
        in_channels: int = 3,
        qkv_bias: bool = True,
        cls_token: bool = True,
        out_indices: Sequence[int] = (),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        sizes = _architecture(arch)
        self.depths, self.embed_dims, self.num_heads = (
            tuple(sizes[key]) for key in ("depths", "embed_dims", "num_heads")
        )
        self.mlp_ratios, self.sr_ratios = tuple(sizes["mlp_ratios"]), tuple(sizes["sr_ratios"])
        stages = len(self.depths)
        if any(index not in range(stages) for index in out_indices):
            raise ConfigError(
                f"out_indices={list(out_indices)}: expected stages 0 to {stages - 1}, such as "
                f"{list(range(stages))}"
            )
        self.out_indices = tuple(sorted(out_indices))
        self.qkv_bias = qkv_bias
        self.extra = int(cls_token)
        self.drop_rate = drop_rate
        self.drop_path_rate = drop_path_rate
        self.norm_eps = norm_eps
        self.strides = [math.prod(PATCH_SIZES[: stage + 1]) for stage in range(stages)]
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(size) != 2 or any(side < 1 or side % self.strides[-1] for side in size):
            raise ConfigError(
                f"img_size={img_size}: expected one or two multiples of {self.strides[-1]}"
            )
        self.design = [(size[0] // stride, size[1] // stride) for stride in self.strides]

        rates = iter(drop_path_rates(drop_path_rate, sum(self.depths)))
        for stage, dims in enumerate(self.embed_dims):
            channels = self.embed_dims[stage - 1] if stage else in_channels
            embed = PatchEmbed(channels, dims, PATCH_SIZES[stage], norm=True)
            cells = math.prod(self.design[stage]) + self.stage_extra(stage)
            blocks = [self.build_block(stage, next(rates)) for _ in range(self.depths[stage])]
            setattr(self, f"patch_embed{stage + 1}", embed)
            setattr(self, f"pos_embed{stage + 1}", nn.Parameter(torch.zeros(1, cells, dims)))
            setattr(self, f"block{stage + 1}", nn.ModuleList(blocks))
        if cls_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dims[-1]))
        self.pos_drop = nn.Dropout(drop_rate) if drop_rate else nn.Identity()
        self.norm: nn.Module = nn.Identity()
        if not out_indices:
            self.norm = nn.LayerNorm(self.embed_dims[-1], eps=norm_eps)
        self.reset_parameters()

    def build_block(self, stage: int, drop_path_rate: float) -> nn.Module:
        """Build one encoder block; subclasses put their own here.

        Args:
            stage: Stage, from 0.
            drop_path_rate: Rate of this block.
        """
        dims = self.embed_dims[stage]
        attn = SpatialReductionAttention(
            dims, self.num_heads[stage], self.qkv_bias, self.drop_rate, self.sr_ratios[stage]
        )
        return PyramidBlock(
            dims, attn, self.mlp_ratios[stage], self.drop_rate, drop_path_rate, self.norm_eps
        )

    def reset_parameters(self) -> None:
        """Draw fresh weights: trunc_normal 0.02 for class token, position embeddings and layers."""
        init_transformer(self)
        for name, value in self.named_parameters(recurse=False):
            if name == "cls_token" or name.startswith("pos_embed"):
                nn.init.trunc_normal_(value, std=0.02)

    def stage_extra(self, stage: int) -> int:
        """Return the number of extra tokens of a stage: only the last one has a class token.

        Args:
            stage: Stage, from 0.
        """
        return self.extra if stage == len(self.depths) - 1 else 0

    def blocks(self, stage: int) -> Sequence[Any]:
        """Return the blocks of a stage.

        Args:
            stage: Stage, from 0.
        """
        return getattr(self, f"block{stage + 1}")

    @property
    def size_divisor(self) -> int:
        """What height and width in px have to be multiples of."""
        units = [stride * ratio for stride, ratio in zip(self.strides, self.sr_ratios)]
        return math.lcm(*self.strides, *units)

    @property
    def size_hint(self) -> str:
        """What else a user can do about an image size that does not fit."""
        return ""

    def grids(self, size: Sequence[int]) -> list[tuple[int, int]]:
        """Return the token grid of every stage.

        Args:
            size: Height and width in px.

        Raises:
            DataError: The model cannot take images of this size; names the nearest it can.
        """
        height, width = size
        unit = self.size_divisor
        if height % unit or width % unit or 0 in (height, width):
            below = tuple(max(side // unit, 1) * unit for side in size)
            above = tuple(max(-(-side // unit), 1) * unit for side in size)
            text = " or ".join(f"{h} x {w}" for h, w in sorted({below, above}))
            raise DataError(
                f"an input of {height} x {width} px does not fit this pyramid, whose sides are "
                f"multiples of {unit} px; use images of {text} px (height x width){self.size_hint}"
            )
        return [(height // stride, width // stride) for stride in self.strides]

    def encode(
        self, images: Tensor, run: Callable[[int, int, nn.Module, Tensor], Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the stages.

        Args:
            images: Images of a size that `grids` accepts.
            run: Runs one block; gets its stage, its number in the whole model, itself and its
                input.

        Shape:
            images [B, in_channels, H, W]; returns the last stage's tokens [B, N, C] before the
            final norm and the maps of `out_indices`.
        """
        maps, number, x, pixels = [], 0, images, images
        last = len(self.depths) - 1
        for stage in range(last + 1):
            extra = self.stage_extra(stage)
            x, grid = getattr(self, f"patch_embed{stage + 1}")(pixels)
            if extra:
                x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
            pos_embed = getattr(self, f"pos_embed{stage + 1}")
            design = self.design[stage]
            x = self.pos_drop(x + resize_pos_embed(pos_embed, design, grid, extra, mode="bilinear"))
            for block in self.blocks(stage):
                x = run(stage, number, block, x)
                number += 1
            if stage < last or stage in self.out_indices:
                pixels = x[:, extra:].transpose(1, 2).unflatten(2, grid)
            if stage in self.out_indices:
                maps.append(pixels)
        return x, tuple(maps)

    def forward(self, images: Tensor, out_blocks: Sequence[int] = ()) -> TokenFeatures:
        """Encode images.

        Args:
            images: Images whose sides are multiples of `size_divisor`.
            out_blocks: Blocks, numbered from 0 through all stages, whose outputs are returned too.

        Shape:
            images [B, in_channels, H, W]; tokens [B, N, C] of the last stage, not normed with
            `out_indices`; maps [B, C_i, H / stride_i, W / stride_i].

        Raises:
            DataError: The model cannot take images of this size.
        """
        grids = self.grids(images.shape[-2:])
        depth = sum(self.depths)
        uniforms: Sequence[Tensor | None] = [None] * depth
        if self.training and self.drop_path_rate > 0:
            uniforms = batch_random.uniform(len(images), (depth, 2), images.device).unbind(1)
        kept = []

        def run(stage: int, number: int, block: nn.Module, x: Tensor) -> Tensor:
            x = block(x, grids[stage], uniforms[number])
            if number in out_blocks:
                kept.append(x)
            return x

        tokens, maps = self.encode(images, run)
        return TokenFeatures(
            tokens=self.norm(tokens),
            grid=grids[-1],
            extra=self.extra,
            blocks=tuple(kept),
            maps=maps,
            dense_macs=self.macs(grids),
        )

    def embedding_macs(self, grids: Sequence[tuple[int, int]]) -> float:
        """Count the patch embeddings and their norms for one image.

        Args:
            grids: Token grid of every stage.
        """
        return sum(
            math.prod(grid) * (self._patch(stage).weight[0].numel() + 1.0) * self.embed_dims[stage]
            for stage, grid in enumerate(grids)
        )

    def _patch(self, stage: int) -> nn.Conv2d:
        return getattr(self, f"patch_embed{stage + 1}").proj

    def macs(self, grids: Sequence[tuple[int, int]]) -> float:
        """Count the multiply-accumulates for one image: patch embeddings and blocks.

        Args:
            grids: Token grid of every stage.
        """
        return self.embedding_macs(grids) + sum(
            block.macs(self.stage_extra(stage) + math.prod(grid))
            for stage, grid in enumerate(grids)
            for block in self.blocks(stage)
        )


def _architecture(arch: str | dict[str, Any]) -> dict[str, Any]:
    keys = ("depths", "embed_dims", "num_heads", "mlp_ratios", "sr_ratios")
    if isinstance(arch, str):
        if arch not in ARCHITECTURES:
            raise ConfigError(
                f"arch='{arch}' is unknown.{did_you_mean(arch, ARCHITECTURES)} Use one of "
                f"{sorted(ARCHITECTURES)} or a dict with {', '.join(keys)}"
            )
        return ARCHITECTURES[arch]
    stages = {len(arch.get(key, ())) for key in keys}
    if len(stages) != 1 or not 1 <= min(stages) <= len(PATCH_SIZES):
        raise ConfigError(
            f"arch={arch}: expected {', '.join(keys)}, each with one entry for every stage, at "
            f"most {len(PATCH_SIZES)}"
        )
    return arch
