"""What a forward pass of the Dynamic Grained Encoder decided, and what it costs.

All costs are multiply-accumulates. Two accountings exist: `upstream` repeats the official counts
(and its slips), `corrected` is right.

Letters: B images, H x W token grid, E extra tokens, N = E + H * W, Hr x Wr regions of r x r tokens,
S splits, Q queries of an image, M keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from patchreg.utils.errors import ConfigError

ACCOUNTINGS = ("upstream", "corrected")


def check_accounting(accounting: str) -> str:
    """Return the name of an accounting if it exists.

    Args:
        accounting: `upstream` or `corrected`.

    Raises:
        ConfigError: It does not exist.
    """
    if accounting not in ACCOUNTINGS:
        raise ConfigError(f"accounting={accounting!r} is unknown; use one of {list(ACCOUNTINGS)}")
    return accounting


@cache  # Without limit: captured graphs go on reading what they were captured with.
def query_table(grid: tuple[int, int], splits: tuple[int, ...], device: torch.device) -> Tensor:
    """Count the queries of every candidate in every region, without squares outside the grid.

    Args:
        grid: Token grid (H, W).
        splits: Queries per region side of the candidates.
        device: Where the table is kept.

    Shape:
        Returns [Hr, Wr, S] float64.
    """
    region = max(splits)

    def side(length: int, split: int) -> Tensor:
        step = region // split
        starts = range(0, length, region)
        counts = [-(-min(region, length - start) // step) for start in starts]
        return torch.tensor(counts, dtype=torch.float64)

    # The table outlives the call, so it must be an ordinary tensor even when first asked for in
    # inference mode.
    with torch.inference_mode(False):
        table = [torch.outer(side(grid[0], split), side(grid[1], split)) for split in splits]
        return torch.stack(table, dim=-1).to(device)


@cache
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept on the device: making a tensor of Python numbers there would wait for it in every step.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float64, device=device)


def spread_regions(
    values: Tensor, grid: tuple[int, int], finest: tuple[int, int], cells: Sequence[int]
) -> Tensor:
    """Give each region of the finest grid the value of the region of another grid around its middle.

    Args:
        values: One value for every region.
        grid: Token grid (H, W) of the values.
        finest: Finest token grid of the model.
        cells: Regions (rows, columns) of the finest grid.

    Shape:
        values [B, Hr, Wr]; returns [B, rows, columns].
    """
    for dim, (own, fine, count) in enumerate(zip(grid, finest, cells, strict=True), start=1):
        if own != fine:
            middle = torch.arange(count, device=values.device) * 2 + 1
            index = (middle * own).div(2 * fine, rounding_mode="floor")
            values = values.index_select(dim, index.clamp(max=values.shape[dim] - 1))
    return values


@dataclass(frozen=True)
class BlockCost:
    """Cost of one encoder block as a linear function of its number of queries.

    Source:
        `complexity` of the official blocks; two products of attention are counted by the corrected
        accounting always, by upstream in DeiT-DGE only.

    Args:
        dims: Channels C.
        num_heads: Heads.
        mlp_dims: Hidden channels of the MLP.
        tokens: All tokens N of an image.
        region: Region side r, or 0 for a block whose router does not run.
        candidates: Number of splits S.
        sr_ratio: Spatial reduction of keys and values per side; 1 for none.
        upstream_products: Attention products counted by the upstream accounting.
    """

    dims: int
    num_heads: int
    mlp_dims: int
    tokens: int
    region: int
    candidates: int
    sr_ratio: int = 1
    upstream_products: int = 2

    @property
    def keys(self) -> float:
        """Key/value tokens M of an image."""
        return self.tokens / self.sr_ratio**2

    @property
    def fixed(self) -> float:
        """Cost whatever the queries: norms, keys and values, spatial reduction, router."""
        cost = 2 * self.tokens * self.dims + 2 * self.keys * self.dims**2
        if self.sr_ratio > 1:
            cost += self.tokens * self.dims**2 + self.keys * self.dims
        if self.region:
            cost += self.tokens / self.region**2 * self.dims * (1 + self.candidates)
        return float(cost)

    def per_query(self, accounting: str) -> float:
        """Return the cost of one query.

        Args:
            accounting: `upstream` or `corrected`.
        """
        products = 2 if accounting == "corrected" else self.upstream_products
        attention = products * self.keys * self.dims + 3 * self.keys * self.num_heads
        return float(2 * self.dims**2 + attention + 2 * self.dims * self.mlp_dims + self.mlp_dims)

    def static(self, accounting: str) -> float:
        """Return the cost when every token is a query.

        Args:
            accounting: `upstream` or `corrected`.
        """
        return self.fixed + self.tokens * self.per_query(accounting)


@dataclass(eq=False)
class BlockRouting:
    """Decision of one block.

    Args:
        cost: Cost function of the block.
        static_cost: Cost function of its dense twin; differs where a block skips work.
        queries: Queries of every image; differentiable while training.
        choice: Chosen split of every region, or None where nothing was routed.
        logits: Router output, or None.
        grid: Token grid (H, W) of the block.
        splits: Queries per region side of the candidates.
        computed: Queries of every image that were really computed, where that is not `queries`: the
            dense path computes all candidates.

    Shape:
        queries [B] float64; choice [B, Hr, Wr] int64; logits [B, Hr, Wr, S].
    """

    cost: BlockCost
    static_cost: BlockCost
    queries: Tensor
    choice: Tensor | None
    logits: Tensor | None
    grid: tuple[int, int]
    splits: tuple[int, ...]
    computed: int | None = None


@dataclass(eq=False)
class Routing:
    """Decisions of one forward pass, block by block, and the cost of the model around the blocks.

    It belongs to the pass that made it: no module keeps it, so two passes before a loss, or an
    evaluation between them, do not mix.

    Differs from official:
        The official encoder keeps the last decision as module state, with its graph.

    Args:
        blocks: Decisions in execution order.
        constants: Cost outside the blocks, for each accounting.
    """

    blocks: list[BlockRouting] = field(default_factory=list)
    constants: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ACCOUNTINGS, 0.0))

    def add_constant(self, macs: float, upstream: float | None = None) -> None:
        """Add a cost outside the blocks, such as the classifier's.

        Args:
            macs: Multiply-accumulates for one image.
            upstream: What the official code counts for it, where that differs.
        """
        self.constants["corrected"] += macs
        self.constants["upstream"] += macs if upstream is None else upstream

    def dynamic(self, accounting: str) -> Tensor:
        """Return the cost of the model for every image, with the chosen queries.

        Args:
            accounting: `upstream` or `corrected`.

        Shape:
            Returns [B] float64; differentiable while training.
        """
        fixed = self.constants[accounting] + sum(block.cost.fixed for block in self.blocks)
        slopes = tuple(block.cost.per_query(accounting) for block in self.blocks)
        queries = torch.stack([block.queries for block in self.blocks], dim=1)
        return fixed + queries @ _constants(slopes, queries.device)

    def executed(self, accounting: str) -> Tensor:
        """Return the cost of what was really computed for every image.

        The same as `dynamic` on the sparse path; more than the dense twin on the dense path.

        Args:
            accounting: `upstream` or `corrected`.

        Shape:
            Returns [B] float64.
        """
        macs = self.dynamic(accounting).detach()
        for block in self.blocks:
            if block.computed is not None:
                surplus = block.computed - block.queries.detach()
                macs = macs + surplus * block.cost.per_query(accounting)
        return macs

    def static(self, accounting: str) -> float:
        """Return the cost of the model when every token is a query.

        Args:
            accounting: `upstream` or `corrected`.
        """
        return self.constants[accounting] + sum(
            block.static_cost.static(accounting) for block in self.blocks
        )

    @property
    def routed(self) -> list[BlockRouting]:
        """Blocks in which regions chose a granularity."""
        return [block for block in self.blocks if block.choice is not None]

    def shares(self) -> Tensor:
        """Return how finely each block looks at each region, as a share of full sampling.

        Regions are those of the finest grid, to which the choices of coarser stages are spread.

        Shape:
            Returns [B, routed blocks, rows, columns], s^2 / r^2 of the chosen splits.
        """
        finest = max((block.grid for block in self.routed), key=math.prod)
        cells = [-(-side // max(self.routed[0].splits)) for side in finest]
        parts = []
        for block in self.blocks:
            if block.choice is None:
                continue
            values = tuple((split / max(block.splits)) ** 2 for split in block.splits)
            shares = _constants(values, block.choice.device).float()[block.choice]
            parts.append(spread_regions(shares, block.grid, finest, cells))
        return torch.stack(parts, dim=1)

    def histogram(self) -> Tensor:
        """Return how the regions of each image are spread over the candidates, block by block.

        Shape:
            Returns [B, routed blocks, S] float32; the last dimension sums to 1. Blocks need equal
            S.
        """
        parts = []
        for block in self.blocks:
            if block.choice is None:
                continue
            choice = block.choice.flatten(1)
            counts = [(choice == index).float().mean(1) for index in range(len(block.splits))]
            parts.append(torch.stack(counts, dim=1))
        return torch.stack(parts, dim=1)
