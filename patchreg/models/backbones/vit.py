"""Vision transformer with one token grid (ViT, DeiT, the encoder of DINO).

Letters: B images, E extra tokens, H x W token grid, N = E + H * W tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from patchreg.models.base import TokenFeatures
from patchreg.models.layers import (
    Attention,
    Mlp,
    PatchEmbed,
    drop_path,
    drop_path_rates,
    hidden_width,
    init_transformer,
    keep_tokens,
    resize_pos_embed,
    resize_pos_embed_by_scale,
)
from patchreg.registry import MODELS
from patchreg.utils.errors import ConfigError, did_you_mean
from patchreg.utils.random import batch_random

ARCHITECTURES: dict[str, dict[str, int]] = {
    "tiny": {"embed_dims": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dims": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dims": 768, "depth": 12, "num_heads": 12},
}


POS_RESIZES = ("size", "dino")


class TransformerBlock(nn.Module):
    """Pre-norm encoder block: attention and MLP, each added to its input.

    Args:
        dims: Channels.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLP relative to `dims`.
        qkv_bias: Bias in the qkv projection.
        drop_rate: Dropout after the projection and in the MLP, in [0, 1).
        drop_path_rate: Probability of dropping a branch for an image, in [0, 1).
        norm_eps: Epsilon of the layer norms.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(dims, eps=norm_eps)
        self.attn = Attention(dims, num_heads, qkv_bias, drop_rate)
        self.norm2 = nn.LayerNorm(dims, eps=norm_eps)
        self.mlp = Mlp(dims, hidden_width(dims, mlp_ratio), drop_rate)

    def forward(self, x: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Encode tokens.

        Args:
            x: Tokens.
            uniform: Draws for the two branches, or None to keep both.

        Shape:
            x [B, N, C]; uniform [B, 2]; returns [B, N, C].
        """
        first, second = (None, None) if uniform is None else uniform.unbind(1)
        x = x + drop_path(self.attn(self.norm1(x)), first, self.drop_path_rate)
        return x + drop_path(self.mlp(self.norm2(x)), second, self.drop_path_rate)


@MODELS.register_module()
class VisionTransformerBackbone(BaseModule):
    """ViT/DeiT encoder that returns all tokens, for images of any size.

    Parameter names are those of timm and of the official DeiT, so state dicts fit without renaming.

    Source:
        "Training data-efficient image transformers" (DeiT); the `deit_*_patch16_256` models of
        vtpack.

    Args:
        arch: `tiny`, `small`, `base`, or a dict with `embed_dims`, `depth` and `num_heads`.
        img_size: Side, or height and width, in px, that the position embedding is made for.
        patch_size: Side of a patch in px.
        in_channels: Channels of the image.
        mlp_ratio: Width of the MLP relative to the embedding.
        qkv_bias: Bias in the qkv projections.
        cls_token: Put a class token in front of the grid.
        dist_token: Put a distillation token behind the class token.
        drop_rate: Dropout after the position embedding, the projections and in the MLPs, in [0, 1);
            drawn by each process on its own.
        drop_path_rate: Probability of dropping a branch in the last block, rising linearly from 0,
            in [0, 1).
        norm_eps: Epsilon of the layer norms.
        pos_resize: How the position embedding follows other image sizes: `size` (to the size of the
            new grid) or `dino` (by DINO's scale; also for images that are not square but have as
            many patches).
        crop_remainder: Leave out pixels at the right and the bottom that fill no patch, instead of
            refusing the image.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: Unknown `arch` or `pos_resize`, a distillation token without a class token, or
            sizes that do not fit.
    """

    def __init__(
        self,
        arch: str | dict = "tiny",
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        cls_token: bool = True,
        dist_token: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        pos_resize: str = "size",
        crop_remainder: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if pos_resize not in POS_RESIZES:
            raise ConfigError(
                f"pos_resize='{pos_resize}' is unknown; use one of {', '.join(POS_RESIZES)}"
            )
        if isinstance(arch, str) and arch not in ARCHITECTURES:
            raise ConfigError(
                f"arch='{arch}' is unknown.{did_you_mean(arch, ARCHITECTURES)} Use one of "
                f"{sorted(ARCHITECTURES)} or a dict with embed_dims, depth and num_heads"
            )
        if isinstance(arch, dict) and not all(
            isinstance(arch.get(key), int) for key in ("embed_dims", "depth", "num_heads")
        ):
            raise ConfigError(
                f"arch={dict(arch)}: expected whole numbers embed_dims, depth and num_heads"
            )
        if dist_token and not cls_token:
            raise ConfigError(
                "dist_token=True needs cls_token=True: distillation pairs the two tokens"
            )
        sizes = ARCHITECTURES[arch] if isinstance(arch, str) else arch
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if any(side < patch_size or side % patch_size for side in size):
            raise ConfigError(f"img_size={img_size} is no multiple of patch_size={patch_size}")
        self.embed_dims, self.depth, self.num_heads = (
            sizes[key] for key in ("embed_dims", "depth", "num_heads")
        )
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.drop_rate = drop_rate
        self.drop_path_rate = drop_path_rate
        self.norm_eps = norm_eps
        self.pos_resize = pos_resize
        self.grid = (size[0] // patch_size, size[1] // patch_size)
        self.extra = int(cls_token) + int(dist_token)

        self.patch_embed = PatchEmbed(
            in_channels, self.embed_dims, patch_size, crop_remainder=crop_remainder
        )
        if cls_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dims))
        if dist_token:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, self.embed_dims))
        count = self.extra + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, count, self.embed_dims))
        self.pos_drop = nn.Dropout(drop_rate) if drop_rate else nn.Identity()
        rates = drop_path_rates(drop_path_rate, self.depth)
        self.blocks = nn.ModuleList(self.build_block(rate) for rate in rates)
        self.norm = nn.LayerNorm(self.embed_dims, eps=norm_eps)
        self.reset_parameters()

    def build_block(self, drop_path_rate: float) -> nn.Module:
        """Build one encoder block; subclasses put their own here.

        Args:
            drop_path_rate: Rate of this block.
        """
        return TransformerBlock(
            self.embed_dims,
            self.num_heads,
            self.mlp_ratio,
            self.qkv_bias,
            self.drop_rate,
            drop_path_rate,
            self.norm_eps,
        )

    def reset_parameters(self) -> None:
        """Draw fresh weights: trunc_normal 0.02 for tokens, position embedding and layers."""
        init_transformer(self)
        for name in ("cls_token", "dist_token", "pos_embed"):
            if hasattr(self, name):
                nn.init.trunc_normal_(getattr(self, name), std=0.02)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Turn images into tokens with position embedding.

        Args:
            images: Images whose sides are multiples of the patch size.

        Shape:
            images [B, in_channels, H * patch, W * patch]; returns [B, N, C] and (H, W).
        """
        tokens, grid = self.patch_embed(images)
        front = [
            getattr(self, name).expand(tokens.shape[0], -1, -1)
            for name in ("cls_token", "dist_token")
            if hasattr(self, name)
        ]
        tokens = torch.cat((*front, tokens), dim=1) if front else tokens
        pos_embed = self.position_embedding(grid, images.shape[2] == images.shape[3])
        return self.pos_drop(tokens + pos_embed), grid

    def position_embedding(self, grid: tuple[int, int], square: bool = True) -> Tensor:
        """Return the position embedding for a token grid.

        Args:
            grid: Rows and columns.
            square: Whether the image is square in px.

        Shape:
            Returns [1, N, C].
        """
        if self.pos_resize == "size":
            return resize_pos_embed(self.pos_embed, self.grid, grid, self.extra)
        if square and grid[0] * grid[1] == self.grid[0] * self.grid[1]:
            return self.pos_embed
        return resize_pos_embed_by_scale(self.pos_embed, self.grid, grid, self.extra)

    def forward(
        self, images: Tensor, out_blocks: Sequence[int] = (), cells: Tensor | None = None
    ) -> TokenFeatures:
        """Encode images, or some patches of them.

        Args:
            images: Images whose sides are multiples of the patch size.
            out_blocks: Blocks, from 0, whose outputs are returned too.
            cells: Patches that take part, or None for all. They keep their positions; the others are
                removed behind the embedding, extra tokens stay.

        Shape:
            images [B, in_channels, H * patch, W * patch]; cells [B, K] int64; tokens [B, N, C], with
            cells [B, E + K, C].
        """
        x, grid = self.embed(images)
        macs = None
        if cells is not None:
            x = keep_tokens(x, cells, self.extra)
            macs = x.new_full((len(x),), self.macs(grid, cells.shape[1]), dtype=torch.float64)
        uniforms: Sequence[Tensor | None] = [None] * self.depth
        if self.training and self.drop_path_rate > 0:
            uniforms = batch_random.uniform(len(x), (self.depth, 2), x.device).unbind(1)
        kept = []
        for index, (block, uniform) in enumerate(zip(self.blocks, uniforms, strict=True)):
            x = block(x, uniform)
            if index in out_blocks:
                kept.append(x)
        return TokenFeatures(
            tokens=self.norm(x),
            grid=grid,
            extra=self.extra,
            blocks=tuple(kept),
            macs=macs,
            dense_macs=self.macs(grid),
        )

    def last_blocks(self, images: Tensor, count: int = 1) -> list[Tensor]:
        """Return the tokens after each of the last blocks, passed through the final norm.

        Column 0 of the tokens is the class token, columns from `extra` on are the patches in raster
        order.

        Source:
            `get_intermediate_layers` of the official DINO.

        Args:
            images: Images as for `forward`.
            count: How many blocks, at most all.

        Shape:
            images [B, in_channels, H * patch, W * patch]; returns `count` times [B, N, C], the
            oldest block first.

        Raises:
            ConfigError: There are not that many blocks.
        """
        if not 1 <= count <= self.depth:
            raise ConfigError(
                f"count={count}: the backbone has {self.depth} blocks; use 1 to {self.depth}"
            )
        features = self(images, out_blocks=range(self.depth - count, self.depth))
        return [self.norm(block) for block in features.blocks[:-1]] + [features.tokens]

    def last_attention(self, images: Tensor) -> Tensor:
        """Return the attention of the last block, whose output is not computed.

        Row 0 is what the class token looks at; columns from `extra` on are the patches in raster
        order.

        Source:
            `get_last_selfattention` of the official DINO.

        Args:
            images: Images as for `forward`.

        Shape:
            images [B, in_channels, H * patch, W * patch]; returns [B, h, N, N], rows sum to 1.
        """
        x, _ = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last: Any = self.blocks[-1]
        return last.attn.weights(last.norm1(x))

    def matmul_macs(self, grid: tuple[int, int]) -> float:
        """Count the multiply-accumulates of the matrix products alone, for one image.

        This is the figure that papers on ViTs give; `macs` counts biases, norms and softmax too.

        Args:
            grid: Rows and columns of the token grid.
        """
        cells = grid[0] * grid[1]
        count, dims = self.extra + cells, self.embed_dims
        block = count * (4 * dims**2 + 2 * dims * hidden_width(dims, self.mlp_ratio))
        block += 2 * count**2 * dims
        return float(self.patch_embed.proj.weight[0].numel() * dims * cells + self.depth * block)

    def macs(self, grid: tuple[int, int], kept: int | None = None) -> float:
        """Count the multiply-accumulates for one image: patch embedding and blocks.

        Args:
            grid: Rows and columns of the token grid.
            kept: Patches that reach the blocks, or None for all.
        """
        cells = grid[0] * grid[1]
        count, dims = self.extra + (cells if kept is None else kept), self.embed_dims
        hidden = hidden_width(dims, self.mlp_ratio)
        block = count * (2 * dims + 4 * dims**2 + 2 * dims * hidden + hidden)
        block += 2 * count**2 * dims + 3 * count**2 * self.num_heads
        return float(self.patch_embed.proj.weight[0].numel() * dims * cells + self.depth * block)
