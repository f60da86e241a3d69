"""Token merging: a trained vision transformer that goes on with fewer tokens after every block.

Letters: B images, N tokens, P patches, C channels, h heads, d = C / h, r merged tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchreg.models.backbones.vit import VisionTransformerBackbone
from patchreg.models.base import PatchClassifier, TokenFeatures
from patchreg.models.layers import hidden_width
from patchreg.registry import MODELS
from patchreg.structures import PatchSelection
from patchreg.utils.errors import ConfigError


def merge(
    x: Tensor, size: Tensor, metric: Tensor, count: int, follow: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Merge the most similar pairs of tokens; the first token is never moved.

    Source:
        "Token Merging: Your ViT But Faster", section 3 (bipartite soft matching).

    Args:
        x: Tokens.
        size: How many patches each token stands for.
        metric: What tokens are compared by.
        count: Tokens r that vanish, at most every second one without the first.
        follow: Tell where every token went.

    Shape:
        x [B, N, C], size [B, N, 1], metric [B, N, d]; returns [B, N - r, C], [B, N - r, 1] and, with
        `follow`, [B, N] int64.
    """
    metric = F.normalize(metric, dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    scores[:, 0] = -torch.inf
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    moved, kept = order[:, :count], order[:, count:].sort(dim=-1).values
    images = torch.arange(len(x), device=x.device)[:, None]
    into = (images * scores.shape[2] + partner.gather(1, moved)).flatten()
    first, second = images * x.shape[1] + 2 * moved, images * x.shape[1] + 2 * kept
    tokens, sizes = x.flatten(0, 1), size.flatten(0, 1)

    def take(values: Tensor, index: Tensor) -> Tensor:
        return values.index_select(0, index.flatten())

    grown = size[:, 1::2].flatten(0, 1).index_add(0, into, take(sizes, first))
    target = (x[:, 1::2] * size[:, 1::2]).flatten(0, 1)
    target = target.index_add_(0, into, take(tokens, first) * take(sizes, first)).div_(grown)
    shape = (len(x), -1)
    place = None
    if follow:
        place = order.new_empty(x.shape[:2])
        behind = kept.shape[1]
        place[:, 1::2] = behind + torch.arange(scores.shape[2], device=x.device)
        place.scatter_(1, 2 * moved, behind + partner.gather(1, moved))
        place.scatter_(1, 2 * kept, torch.arange(behind, device=x.device).expand_as(kept))
    return (
        torch.cat(
            (take(tokens, second).view(*shape, x.shape[2]), target.view(*shape, x.shape[2])), 1
        ),
        torch.cat((take(sizes, second).view(*shape, 1), grown.view(*shape, 1)), 1),
        place,
    )


def merged_macs(model: Any, grid: tuple[int, int], counts: Sequence[int]) -> float:
    """Count the multiply-accumulates for one image, the comparison of tokens included.

    Args:
        model: A `VisionTransformerBackbone`.
        grid: Rows and columns of the token grid.
        counts: Tokens that each block merges.
    """
    dims, heads = model.embed_dims, model.num_heads
    hidden = hidden_width(dims, model.mlp_ratio)
    cells = grid[0] * grid[1]
    tokens = model.extra + cells
    macs = model.patch_embed.proj.weight[0].numel() * dims * cells
    for count in counts:
        macs += tokens * (dims + 4 * dims**2) + tokens**2 * (2 * dims + 3 * heads)
        macs += (tokens + 1) // 2 * (tokens // 2) * dims // heads if count else 0
        tokens -= count
        macs += tokens * (dims + 2 * dims * hidden + hidden)
    return float(macs)


def merges_for(model: Any, grid: tuple[int, int], macs: float) -> list[int]:
    """Return the even schedule of merges whose cost is nearest to a target.

    A block merges at most every second token without the first one.

    Args:
        model: A `VisionTransformerBackbone`.
        grid: Rows and columns of the token grid.
        macs: Wanted multiply-accumulates for one image.
    """
    tokens = model.extra + grid[0] * grid[1]
    plans = []
    for total in range(tokens * 9 // 10):
        left, plan = tokens, []
        for block in range(model.depth):
            wanted = total // model.depth + (block < total % model.depth)
            plan.append(min(wanted, (left - 1) // 2))
            left -= plan[-1]
        plans.append(plan)
    return min(plans, key=lambda plan: abs(merged_macs(model, grid, plan) - macs))


def merged_features(
    model: VisionTransformerBackbone, images: Tensor, counts: Sequence[int], follow: bool = False
) -> TokenFeatures:
    """Encode images with tokens merged between attention and MLP of each block.

    Attention is proportional to the sizes; tokens are compared by the mean key of the heads.

    Source:
        "Token Merging: Your ViT But Faster" (ICLR 2023), section 3.

    Args:
        model: A plain vision transformer in evaluation mode.
        images: Images whose sides are multiples of the patch size.
        counts: Tokens that each block merges.
        follow: Put into `routing` which token each one has ended in.

    Shape:
        images [B, in_channels, H, W]; tokens [B, N - merged, C]; routing [B, N] int64.
    """
    x, grid = model.embed(images)
    size = x.new_ones(*x.shape[:2], 1)
    place = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    blocks: Any = model.blocks
    for index, (block, count) in enumerate(zip(blocks, counts)):
        attn, (batch, tokens, dims) = block.attn, x.shape
        qkv = attn.qkv(block.norm1(x)).view(batch, tokens, 3, attn.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mask = size.log().view(batch, 1, 1, tokens).expand(-1, -1, tokens, -1) if index else None
        out = F.scaled_dot_product_attention(query, key, value, mask)
        x = x + attn.proj(out.transpose(1, 2).reshape(batch, tokens, dims))
        if count:
            x, size, moved = merge(x, size, key.mean(1), count, follow)
            place = place if moved is None else moved.gather(1, place)
        x = x + block.mlp(block.norm2(x))
    spent = merged_macs(model, grid, counts)
    return TokenFeatures(
        tokens=model.norm(x),
        grid=grid,
        extra=model.extra,
        macs=x.new_full((len(x),), spent, dtype=torch.float64),
        dense_macs=model.macs(grid),
        routing=place if follow else None,
    )


@MODELS.register_module()
class TokenMergingClassifier(PatchClassifier):
    """A trained vision transformer that merges similar tokens in evaluation; nothing is trained for it.

    Takes the weights of a `PatchClassifier`; in training it is one. A patch counts with the share of the
    token in which it ended.

    Source:
        "Token Merging: Your ViT But Faster" (ICLR 2023).

    Args:
        share: Wanted cost of the transformer relative to no merging, in (0, 1]; all blocks merge alike, and
            the nearest plan is taken.
        backbone: Config of a `VisionTransformerBackbone`.
        head: Config of the head.
        data_preprocessor: Config of the preprocessor, or None.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: `share` is outside (0, 1], or the backbone is another one.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict,
        share: float = 0.6,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(backbone, head, data_preprocessor, init_cfg)
        if not 0 < share <= 1:
            raise ConfigError(f"share={share} is outside (0, 1]")
        if type(self.backbone) is not VisionTransformerBackbone:
            raise ConfigError(
                f"TokenMergingClassifier merges the tokens of a VisionTransformerBackbone, not of a "
                f"{type(self.backbone).__name__}"
            )
        self.share = share
        self._plans: dict[tuple[int, int], list[int]] = {}

    def extract(self, inputs: Tensor, follow: bool = False) -> TokenFeatures:
        """Run the backbone, in evaluation with merged tokens.

        Args:
            inputs: Preprocessed images.
            follow: Put into `routing` which token each one has ended in.

        Shape:
            inputs [B, 3, H, W].
        """
        if self.training:
            return super().extract(inputs)
        side = self.backbone.patch_embed.patch_size
        grid = (inputs.shape[2] // side, inputs.shape[3] // side)
        if grid not in self._plans:
            wanted = self.share * self.backbone.macs(grid)
            self._plans[grid] = merges_for(self.backbone, grid, wanted)
        return merged_features(self.backbone, inputs, self._plans[grid], follow)

    @torch.no_grad()
    def select(self, inputs: Tensor) -> PatchSelection:
        """Say how finely each patch is still represented after the last block.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        features = self.extract(inputs, follow=True)
        macs, dense_macs = self.cost(features)
        place = features.routing
        ones = torch.ones_like(place, dtype=torch.float32)
        sizes = torch.zeros_like(ones).scatter_add_(1, place, ones)
        share = (1 / sizes.gather(1, place))[:, features.extra :]
        return PatchSelection.of_all(
            image_size=(inputs.shape[2], inputs.shape[3]),
            grid=features.grid,
            score=share,
            resolution=share,
            macs=macs,
            dense_macs=dense_macs,
        )
