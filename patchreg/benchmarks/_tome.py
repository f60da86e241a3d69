"""Token merging, the method without regions that DGE is measured against.

Letters: B images, N tokens, C channels, h heads, d = C / h, r merged tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def merge(x: Tensor, size: Tensor, metric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merge the most similar pairs of tokens; the first token is never moved.

    Source:
        "Token Merging: Your ViT But Faster", section 3 (bipartite soft matching).

    Args:
        x: Tokens.
        size: How many patches each token stands for.
        metric: What tokens are compared by.
        count: Tokens r that vanish.

    Shape:
        x [B, N, C], size [B, N, 1], metric [B, N, d]; returns [B, N - r, C] and [B, N - r, 1].
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
    return (
        torch.cat(
            (take(tokens, second).view(*shape, x.shape[2]), target.view(*shape, x.shape[2])), 1
        ),
        torch.cat((take(sizes, second).view(*shape, 1), grown.view(*shape, 1)), 1),
    )


class TokenMerging:
    """Runs a plain vision transformer with tokens merged between attention and MLP of each block.

    Attention is proportional to the sizes; tokens are compared by the mean key of the heads.

    Args:
        model: A `VisionTransformerBackbone`.
        counts: Tokens that each block merges.
    """

    def __init__(self, model: Any, counts: Sequence[int]) -> None:
        self.model = model
        self.counts = counts

    def __call__(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: Images whose sides are multiples of the patch size.
        """
        x, _ = self.model.embed(images)
        size = x.new_ones(*x.shape[:2], 1)
        for index, (block, count) in enumerate(zip(self.model.blocks, self.counts)):
            attn, (batch, tokens, dims) = block.attn, x.shape
            qkv = attn.qkv(block.norm1(x)).view(batch, tokens, 3, attn.num_heads, -1)
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            mask = (
                size.log().view(batch, 1, 1, tokens).expand(-1, -1, tokens, -1) if index else None
            )
            out = F.scaled_dot_product_attention(query, key, value, mask)
            x = x + attn.proj(out.transpose(1, 2).reshape(batch, tokens, dims))
            if count:
                x, size = merge(x, size, key.mean(1), count)
            x = x + block.mlp(block.norm2(x))
        return self.model.norm(x)


def merged_macs(model: Any, grid: tuple[int, int], counts: Sequence[int]) -> float:
    """Count the multiply-accumulates for one image, the comparison of tokens included.

    Args:
        model: A `VisionTransformerBackbone`.
        grid: Rows and columns of the token grid.
        counts: Tokens that each block merges.
    """
    dims, heads = model.embed_dims, model.num_heads
    hidden = int(dims * model.mlp_ratio)
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

    Args:
        model: A `VisionTransformerBackbone`.
        grid: Rows and columns of the token grid.
        macs: Wanted multiply-accumulates for one image.
    """
    depth = model.depth
    most = (model.extra + grid[0] * grid[1]) * 9 // 10
    plans = [
        [total // depth + (block < total % depth) for block in range(depth)]
        for total in range(most)
    ]
    return min(plans, key=lambda plan: abs(merged_macs(model, grid, plan) - macs))
