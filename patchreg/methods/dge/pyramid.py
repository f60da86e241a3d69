"""Pyramid transformers of the DGE paper's code: PVT with routers, and DPVT with sampled attention.

Letters: B images, E extra tokens, H x W token grid of a stage, N = E + H * W tokens, C channels, h
heads, d = C / h, P points, Hr x Wr regions of r x r tokens, S splits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from patchreg_ops import bilinear_pointwise
from torch import Tensor, nn

from patchreg.methods.dge.block import DGEBlock, Prepared, needs_gradient
from patchreg.methods.dge.cost import Routing
from patchreg.methods.dge.model import check_modes, draw_drop_path, reset_routers
from patchreg.methods.dge.router import check_splits
from patchreg.models.backbones.pvt import PyramidBlock, PyramidVisionTransformerBackbone
from patchreg.models.base import TokenFeatures
from patchreg.models.layers import check_heads
from patchreg.registry import MODELS
from patchreg.utils.errors import ConfigError, DataError
from patchreg.utils.random import batch_random


@MODELS.register_module()
class DGEPyramidVisionTransformerBackbone(PyramidVisionTransformerBackbone):
    """PVT in which every block of every stage queries each region at a granularity of its choice.

    Source:
        DGE (NeurIPS 2021); `pvt_dge_s124_*_256` of vtpack.

    Args:
        arch: As in `PyramidVisionTransformerBackbone`.
        img_size: As in `PyramidVisionTransformerBackbone`.
        splits: Queries per region side of each candidate, in all stages; the region side is the
            largest.
        sparse_train: Train on the chosen granularity only; cheaper, but gates that were not chosen
            get no gradient and accuracy suffers.
        eval_path: `sparse` computes the chosen queries only, `dense` all of them with hard gates
            (the same result). Can be changed at any time.
        skip_last_queries: In evaluation, run only the class token through the last block: same
            logits.
        drop_path_mode: `query` drops single queries, as published; `sample` drops images.
        region_padding: Accept token grids that the region does not divide (224 px): they count as
            padded on the right and bottom, and only real tokens are averaged.
        attention_backend: How the packed queries of the sparse path attend, all with the same
            result: `varlen` (CUDA, half precision), `padded`, `per_image`, or `auto` for the
            fastest one that works.
        init_cfg: Weights to load, as in MMEngine.
        kwargs: Further arguments of `PyramidVisionTransformerBackbone`.

    Raises:
        ConfigError: Splits, paths or modes that do not exist or do not fit.

    Differs from official:
        Any image size that the strides and regions divide; the routing comes back with the output.
    """

    def __init__(
        self,
        arch: str | dict = "tiny",
        img_size: int | Sequence[int] = 256,
        splits: Sequence[int] = (4, 2, 1),
        sparse_train: bool = False,
        eval_path: str = "sparse",
        skip_last_queries: bool = False,
        drop_path_mode: str = "query",
        region_padding: bool = False,
        attention_backend: str = "auto",
        init_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        check_modes(eval_path, drop_path_mode)
        self.splits = check_splits(splits)
        self.sparse_train = sparse_train
        self.eval_path = eval_path
        self.skip_last_queries = skip_last_queries
        self.drop_path_mode = drop_path_mode
        self.region_padding = region_padding
        self.attention_backend = attention_backend
        super().__init__(arch=arch, img_size=img_size, init_cfg=init_cfg, **kwargs)
        if skip_last_queries and (not self.extra or self.out_indices or sum(self.depths) < 2):
            raise ConfigError(
                "skip_last_queries=True needs a class token, no out_indices (otherwise every token "
                "is read) and two blocks (with one nothing would be routed)"
            )

    def build_block(self, stage: int, drop_path_rate: float) -> nn.Module:
        """Build one encoder block with its router.

        Args:
            stage: Stage, from 0.
            drop_path_rate: Rate of this block.
        """
        return DGEBlock(
            self.embed_dims[stage],
            self.num_heads[stage],
            self.splits,
            self.mlp_ratios[stage],
            self.qkv_bias,
            self.drop_rate,
            drop_path_rate,
            self.norm_eps,
            self.sr_ratios[stage],
            upstream_products=1,
            attention_backend=self.attention_backend,
        )

    def reset_parameters(self) -> None:
        """Draw fresh weights; routers last, because the general way would undo theirs."""
        super().reset_parameters()
        reset_routers(self)

    @property
    def size_divisor(self) -> int:
        """What height and width in px have to be multiples of: regions tile every grid."""
        unit = super().size_divisor
        if self.region_padding:
            return unit
        return math.lcm(unit, *(stride * max(self.splits) for stride in self.strides))

    @property
    def size_hint(self) -> str:
        """What else a user can do about an image size that does not fit."""
        if self.region_padding:
            return ""
        return f", or region_padding=True for any multiple of {super().size_divisor} px"

    def forward(
        self,
        images: Tensor,
        out_blocks: Sequence[int] = (),
        noise: Sequence[Tensor] | None = None,
    ) -> TokenFeatures:
        """Encode images.

        Args:
            images: Images whose sides are multiples of `size_divisor`.
            out_blocks: Blocks, numbered from 0 through all stages, whose outputs are returned too.
            noise: Gumbel noise of every block instead of a fresh draw; in evaluation None means no
                noise.

        Shape:
            images [B, in_channels, H, W]; noise [B, Hr, Wr, S] each, of its stage; tokens [B, N, C]
            of the last stage ([B, E, C] in evaluation with `skip_last_queries`), not normed with
            `out_indices`; maps [B, C_i, H / stride_i, W / stride_i].

        Raises:
            DataError: The model cannot take images of this size, or the noise does not fit.
        """
        grids = self.grids(images.shape[-2:])
        depth = sum(self.depths)
        if noise is not None and len(noise) != depth:
            raise DataError(
                f"noise has {len(noise)} entries; expected one for each of {depth} blocks"
            )
        path = self.eval_path
        noises: Sequence[Tensor | None] = [None] * depth if noise is None else noise
        uniforms: Sequence[Tensor | None] = [None] * depth
        if self.training:
            path = "sparse" if self.sparse_train else "dense"
            if noise is None:
                noises = self._draw_noise(images, grids)
            if self.drop_path_rate:
                uniforms = self._draw_drop_path(images, grids, path)
        routing = Routing(constants=self.constants(grids))
        kept = []
        skips = self.skip_last_queries and not self.training
        # Evaluation in one go: a block leaves what the next one of its stage starts with.
        following: list[nn.LayerNorm | None] = []
        for stage in range(len(self.depths)):
            following += [block.norm1 for block in self.blocks(stage)][1:] + [None]
        prepared: Prepared | None = None
        fused = path == "sparse" and noise is None and not needs_gradient(self, images)

        def run(stage: int, number: int, block: Any, x: Tensor) -> Tensor:
            nonlocal prepared
            way = "front" if skips and number == depth - 1 else path
            extra = self.stage_extra(stage)
            if fused and block.fuses(x):
                x, record, prepared = block.infer(
                    x, grids[stage], extra, way, prepared, following[number]
                )
            else:
                prepared = None
                x, record = block(x, grids[stage], extra, way, noises[number], uniforms[number])
            routing.blocks.append(record)
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
            macs=None if self.training else routing.executed("corrected"),
            dense_macs=routing.static("corrected"),
            routing=routing,
        )

    def _draw_noise(self, images: Tensor, grids: list[tuple[int, int]]) -> list[Tensor]:
        region = max(self.splits)
        noises: list[Tensor] = []
        for count, (height, width) in zip(self.depths, grids, strict=True):
            shape = (count, -(-height // region), -(-width // region), len(self.splits))
            noises += batch_random.gumbel(len(images), shape, images.device).unbind(1)
        return noises

    def _draw_drop_path(
        self, images: Tensor, grids: list[tuple[int, int]], path: str
    ) -> list[Tensor]:
        draws: list[Tensor] = []
        for stage, (count, grid) in enumerate(zip(self.depths, grids, strict=True)):
            draws += draw_drop_path(
                len(images),
                count,
                grid,
                self.stage_extra(stage),
                self.splits,
                path,
                self.drop_path_mode,
                images.device,
            )
        return draws

    def constants(self, grids: Sequence[tuple[int, int]]) -> dict[str, float]:
        """Count the patch embeddings for one image, in both accountings.

        Args:
            grids: Token grid of every stage.

        Differs from official:
            `upstream` repeats its slip of counting channels x height pixels instead of height x
            width, which carries on through the stages.
        """
        macs = self.embedding_macs(grids)
        channels = self.patch_embed1.proj.in_channels
        width = grids[0][1] * self.strides[0]
        return {"upstream": macs * channels / width, "corrected": macs}


class DGEDeformableAttention(nn.Module):
    """Attention to a few sampled points around each token instead of to all tokens.

    Source:
        `Attention` of vtpack's DPVT (single-level deformable sampling).

    Args:
        dims: Channels C.
        num_heads: Heads; divides `dims`.
        num_points: Points P that a head of a token looks at.
        qkv_bias: Bias of the value projection.
        drop_rate: Dropout after the output projection, in [0, 1).
        gradient_scale: Factor on the gradient that flows back through a sampling point.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        num_points: int = 4,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        gradient_scale: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_heads = check_heads(dims, num_heads)
        self.num_points = num_points
        self.gradient_scale = gradient_scale
        self.v = nn.Linear(dims, dims, bias=qkv_bias)
        self.offsets = nn.Linear(dims, num_heads * num_points * 2)
        self.attn_weight = nn.Linear(dims, num_heads * num_points)
        self.proj = nn.Linear(dims, dims)
        self.drop = nn.Dropout(drop_rate) if drop_rate else nn.Identity()

    def reset_offsets(self) -> None:
        """Let each head look in a direction of its own, at steps of one pixel.

        The direction of head j is (cos, sin)(2 pi j / h), stretched to the border of the square
        around the token.
        """
        angle = 2 * math.pi * torch.arange(self.num_heads) / self.num_heads
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)
        nn.init.zeros_(self.offsets.weight)
        with torch.no_grad():
            self.offsets.bias.copy_((direction[:, None] * steps[:, None]).flatten())

    def keys(self, source: Tensor, grid: tuple[int, int]) -> Tensor:
        """Project the values, as maps that are sampled.

        Args:
            source: Normed tokens.
            grid: Their grid (H, W).

        Shape:
            source [B, H * W, C]; returns [B * h, H, W, d].
        """
        batch, _, dims = source.shape
        maps = self.v(source).view(batch, *grid, self.num_heads, dims // self.num_heads)
        return maps.permute(0, 3, 1, 2, 4).flatten(0, 1)

    def forward(self, tokens: Tensor, keys: Tensor) -> Tensor:
        """Attend from all tokens of the grid.

        Args:
            tokens: Normed tokens in raster order.
            keys: Result of `keys`.

        Shape:
            tokens [B, H * W, C]; returns the same.
        """
        batch, count, dims = tokens.shape
        heads, number = self.num_heads, self.num_points
        weight = self.attn_weight(tokens).view(batch, count, heads, number).softmax(dim=-1)
        weight = weight.transpose(1, 2).flatten(0, 1).to(keys.dtype)
        out = bilinear_pointwise(keys, self.points(tokens, keys.shape[1:3]), weight)
        out = out.view(batch, heads, count, dims // heads).transpose(1, 2)
        return self.drop(self.proj(out.reshape(tokens.shape)))

    def points(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the sampling points, in pixels of the grid; at least float32, also under autocast.

        Args:
            tokens: Normed tokens in raster order.
            grid: Their grid (H, W).

        Shape:
            tokens [B, H * W, C]; returns [B * h, H * W, P, 2], last (x, y).
        """
        batch, count, _ = tokens.shape
        with torch.autocast(tokens.device.type, enabled=False):
            offsets = self.offsets(tokens.to(self.offsets.weight.dtype))
            offsets = offsets.view(batch, count, self.num_heads, self.num_points, 2)
            offsets = offsets.transpose(1, 2).flatten(0, 1)
            offsets = offsets.float() if offsets.element_size() < 4 else offsets
            cells = torch.arange(count, device=tokens.device)
            place = torch.stack((cells % grid[1], cells // grid[1]), dim=-1).to(offsets.dtype)
            point = place[:, None] + offsets
            return point.detach() + self.gradient_scale * (point - point.detach())

    def macs(self, tokens: int) -> float:
        """Count the multiply-accumulates for one image: four pixels for every point and channel.

        Args:
            tokens: Tokens N.
        """
        dims, pairs = self.proj.in_features, self.num_heads * self.num_points
        projections = 2 * dims**2 + 3 * pairs * dims
        return float(tokens * (projections + 3 * pairs + 4 * self.num_points * dims))


@MODELS.register_module()
class DGEDeformablePyramidBackbone(PyramidVisionTransformerBackbone):
    """DPVT: a PVT without class token whose attention samples a few points per head.

    Source:
        The `dpvt_*_256` models of vtpack; read by a head with `pool='mean'`.

    Args:
        arch: As in `PyramidVisionTransformerBackbone`; there is no spatial reduction, so
            `sr_ratios` has no effect.
        img_size: As in `PyramidVisionTransformerBackbone`.
        num_points: Points of a head, in all stages.
        gradient_scale: Factor on the gradient that flows back through a sampling point.
        offset_init: `directions` starts every head in a direction of its own; `published` with
            small random weights and no bias, as the official models do by mistake.
        init_cfg: Weights to load, as in MMEngine.
        kwargs: Further arguments of `PyramidVisionTransformerBackbone`, but no `cls_token`.

    Raises:
        ConfigError: Arguments that do not exist or do not fit.

    Differs from official:
        The directions survive: the official initialisation of the whole model overwrites them.
    """

    def __init__(
        self,
        arch: str | dict = "tiny",
        img_size: int | Sequence[int] = 256,
        num_points: int = 4,
        gradient_scale: float = 0.1,
        offset_init: str = "directions",
        init_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        if offset_init not in ("directions", "published"):
            raise ConfigError(
                f"offset_init={offset_init!r} is unknown; use 'directions' or 'published'"
            )
        if num_points < 1:
            raise ConfigError(f"num_points={num_points}: expected 1 or more; 4 is usual")
        if kwargs.pop("cls_token", False):
            raise ConfigError("cls_token=True: a DPVT has none; use a head with pool='mean'")
        self.num_points = num_points
        self.gradient_scale = gradient_scale
        self.offset_init = offset_init
        super().__init__(arch=arch, img_size=img_size, cls_token=False, init_cfg=init_cfg, **kwargs)
        self.sr_ratios = (1,) * len(self.depths)

    def build_block(self, stage: int, drop_path_rate: float) -> nn.Module:
        """Build one encoder block with sampled attention.

        Args:
            stage: Stage, from 0.
            drop_path_rate: Rate of this block.
        """
        dims = self.embed_dims[stage]
        attn = DGEDeformableAttention(
            dims,
            self.num_heads[stage],
            self.num_points,
            self.qkv_bias,
            self.drop_rate,
            self.gradient_scale,
        )
        return PyramidBlock(
            dims, attn, self.mlp_ratios[stage], self.drop_rate, drop_path_rate, self.norm_eps
        )

    def reset_parameters(self) -> None:
        """Draw fresh weights; offsets last, because the general way would undo theirs."""
        super().reset_parameters()
        if self.offset_init == "directions":
            for part in self.modules():
                if isinstance(part, DGEDeformableAttention):
                    part.reset_offsets()
