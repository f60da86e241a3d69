"""Encoder block of the Dynamic Grained Encoder: few queries, all keys.

Letters: B images, H x W token grid, E extra tokens, N = E + H * W, C channels, h heads, d = C / h,
M keys, L packed queries of the batch, Nd queries of an image in the dense form, S splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from patchreg_ops import (
    compress,
    compress_dense,
    compress_norm,
    decompress,
    decompress_dense,
    decompress_norm,
    region_grid,
    route,
    row_lengths,
    row_plan,
    sum_norm,
)
from torch import Tensor, nn

from patchreg.methods.dge.attention import PackedRows, check_backend, packed_attention
from patchreg.methods.dge.cost import BlockCost, BlockRouting, query_table
from patchreg.methods.dge.router import DynamicGrainedEncoder, region_mean
from patchreg.models.backbones.pvt import SpatialReductionAttention
from patchreg.models.layers import Mlp, drop_path, hidden_width


def needs_gradient(module: nn.Module, x: Tensor) -> bool:
    """Say whether a pass of a module has to remember how to go back.

    Args:
        module: Module that is run.
        x: Its input.
    """
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(value.requires_grad for value in module.parameters())


class HostCopy:
    """Copy of the queries per image to the host; the device runs on until they are read.

    Args:
        tensor: Queries of every image, on any device.

    Shape:
        tensor [B] int64.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        self._tensor = tensor
        self._host = tensor
        if tensor.is_cuda and not torch.compiler.is_compiling():
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            # The copy runs on the stream of its own device, which need not be the current one.
            self._event.record(torch.cuda.current_stream(tensor.device))

    def counts(self, tokens: int) -> tuple[list[int], int, int]:
        """Return the queries of every image, of all together and of the largest image.

        Waits for the copy only. A compiler captures the sum alone: it gets no counts, and the
        tokens as the largest.

        Args:
            tokens: Tokens of an image, which no count exceeds.
        """
        if torch.compiler.is_compiling():
            total = int(self._tensor.sum().item())
            torch._check_is_size(total)
            return [], total, tokens
        if self._event is not None:
            self._event.synchronize()
        values = self._host.tolist()
        return values, sum(values), max(values, default=0)


class Prepared(NamedTuple):
    """What a block computed for the one behind it, while the tokens were at hand.

    Args:
        normed: Tokens after the first norm of that block.
        means: Region means of the tokens.

    Shape:
        normed [B, N, C]; means [B, Hr, Wr, C].
    """

    normed: Tensor
    means: Tensor


class DGEAttention(SpatialReductionAttention):
    """Attention whose queries and keys come from different token sets; queries may be packed.

    Source:
        Official DeiT-DGE and PVT-DGE `Attention`.
    """

    backend = "auto"

    def forward(
        self, tokens: Tensor, keys: tuple[Tensor, Tensor], rows: PackedRows | None = None
    ) -> Tensor:
        """Attend from some tokens.

        Args:
            tokens: Normed query tokens, packed if `rows` is given.
            keys: Result of `keys`.
            rows: Where packed queries belong, or None for equally many per image.

        Shape:
            tokens [B, Q, C] or [L, C]; returns the same.
        """
        if rows is None:
            return super().forward(tokens, keys)
        query = self.q(tokens).unflatten(-1, (self.num_heads, keys[0].shape[-1]))
        return self.drop(self.proj(packed_attention(query, *keys, rows, self.backend)))


class DGEBlock(nn.Module):
    """Pre-norm encoder block that queries each region at the granularity its router chooses.

    Three ways of execution: `dense` runs all granularities and adds them up by the gate, `sparse`
    runs the chosen one on packed queries, and `front` runs the extra tokens only (for a last block
    of which nothing else is read). With noise the choice is drawn and the gate carries the
    straight-through gradient; without, it is the best one.

    Source:
        DGE (NeurIPS 2021); official `Block` wrapped by `DynamicGrainedEncoder`.

    Args:
        dims: Channels C.
        num_heads: Attention heads.
        splits: Queries per region side of each candidate.
        mlp_ratio: Width of the MLP relative to `dims`.
        qkv_bias: Bias of the query and key/value projections.
        drop_rate: Dropout after the projection and in the MLP, in [0, 1).
        drop_path_rate: Probability of dropping a branch, in [0, 1).
        norm_eps: Epsilon of the layer norms.
        sr_ratio: Spatial reduction of keys and values per side; 1 for none.
        upstream_products: Attention products that the upstream accounting counts.
        attention_backend: How packed queries attend, as in `packed_attention`.

    Raises:
        ConfigError: There is no such back-end.

    Differs from official:
        The update is the sum of the two branches, not q2 - q0: the same value without the
        cancellation.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        splits: Sequence[int] = (4, 2, 1),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        sr_ratio: int = 1,
        upstream_products: int = 2,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.upstream_products = upstream_products
        self.norm1 = nn.LayerNorm(dims, eps=norm_eps)
        self.attn = DGEAttention(dims, num_heads, qkv_bias, drop_rate, sr_ratio)
        self.attn.backend = check_backend(attention_backend)
        self.norm2 = nn.LayerNorm(dims, eps=norm_eps)
        self.mlp = Mlp(dims, hidden_width(dims, mlp_ratio), drop_rate)
        self.dge = DynamicGrainedEncoder(dims, splits)

    def cost(self, tokens: int, routed: bool = True) -> BlockCost:
        """Return the cost function of the block.

        Args:
            tokens: Tokens N of an image.
            routed: Whether the router runs.
        """
        return BlockCost(
            dims=self.norm1.normalized_shape[0],
            num_heads=self.attn.num_heads,
            mlp_dims=self.mlp.fc1.out_features,
            tokens=tokens,
            region=self.dge.region if routed else 0,
            candidates=len(self.dge.candidates),
            sr_ratio=self.attn.sr_ratio,
            upstream_products=self.upstream_products,
        )

    def macs(self, tokens: int) -> float:
        """Count the multiply-accumulates for one image when every token is a query.

        Args:
            tokens: Tokens N of an image.
        """
        return self.cost(tokens).static("corrected")

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        extra: int,
        path: str = "dense",
        noise: Tensor | None = None,
        uniform: Tensor | None = None,
    ) -> tuple[Tensor, BlockRouting]:
        """Encode tokens.

        Evaluation without gradients goes the way of `infer`.

        Args:
            x: Tokens, extra tokens first.
            grid: Token grid (H, W).
            extra: Number of extra tokens E.
            path: `dense`, `sparse` or `front`.
            noise: Gumbel noise for a drawn choice, or None for the best one.
            uniform: Draws for drop path: one per branch and image, or one per branch, image and
                query.

        Shape:
            x [B, N, C]; noise [B, Hr, Wr, S]; uniform [B, 2] or [B, 2, >= queries of an image];
            returns [B, N, C], for `front` [B, E, C].
        """
        if path == "dense":
            return self._forward_dense(x, grid, extra, noise, uniform)
        if noise is None and uniform is None and self.fuses(x):
            return self.infer(x, grid, extra, path)[:2]
        if path == "front":
            return self._forward_front(x, grid, extra)
        return self._forward_sparse(x, grid, extra, noise, uniform)

    def fuses(self, x: Tensor) -> bool:
        """Say whether `infer` can take these tokens: no gradient, no dropout, no mixed precision.

        Args:
            x: Tokens.
        """
        if self.training or torch.is_autocast_enabled(x.device.type):
            return False
        if hasattr(self.norm1.weight, "placements"):
            # Sharded weights are gathered only while the block itself is called.
            return False
        return self.norm1.weight.dtype == x.dtype and not needs_gradient(self, x)

    def infer(
        self,
        x: Tensor,
        grid: tuple[int, int],
        extra: int,
        path: str = "sparse",
        prepared: Prepared | None = None,
        following: nn.LayerNorm | None = None,
        capacity: int | None = None,
    ) -> tuple[Tensor, BlockRouting, Prepared | None]:
        """Encode tokens in evaluation with fused operators and, if wanted, prepare the next block.

        Args:
            x: Tokens, extra tokens first.
            grid: Token grid (H, W).
            extra: Number of extra tokens E.
            path: `sparse` or `front`.
            prepared: What the block in front prepared for this one.
            following: Norm that the tokens go through next; its result is prepared.
            capacity: Rows to compute for any choice, so that no shape depends on it; what it means
                when they do not suffice is said at `row_plan`.

        Shape:
            x [B, N, C]; returns [B, N, C], for `front` [B, E, C].
        """
        norm1, norm2, region = self.norm1, self.norm2, self.dge.region
        normed = norm1(x) if prepared is None else prepared.normed
        if path == "front":
            front = x[:, :extra]
            attended = self.attn(normed[:, :extra], self.attn.keys(normed, grid))
            out = front + attended.add_(self.mlp(_fused_sum_norm(front, attended, norm2)))
            queries = torch.full((len(x),), float(extra), dtype=torch.float64, device=x.device)
            return out, self._record(x, grid, queries, None, None), None
        means = region_mean(x, grid, extra, region) if prepared is None else prepared.means
        splits = self.dge.candidates
        logits = self.dge.router(means)
        choice, lengths = route(logits, splits, *grid, extra)
        if capacity is None:
            host = HostCopy(lengths)
            # Keys need no choice: they are computed while the lengths travel to the host.
            keys = self.attn.keys(normed, grid)
            counts, total, longest = host.counts(x.shape[1])
            plan = row_plan(choice, splits, *grid, extra, total=total)
        else:
            keys, counts, longest = self.attn.keys(normed, grid), None, x.shape[1]
            plan = row_plan(choice, splits, *grid, extra, total=capacity, padded=True)
        pooled, normed = compress_norm(x, plan, norm1.weight, norm1.bias, norm1.eps)
        attended = self.attn(normed, keys, PackedRows(plan, counts, longest))
        changed = self.mlp(_fused_sum_norm(pooled, attended, norm2))
        record = self._record(x, grid, lengths.double(), choice, logits)
        if following is None:
            return decompress(attended.add_(changed), plan, reference=x), record, None
        out, normed, means = decompress_norm(
            attended, changed, plan, x, following.weight, following.bias, following.eps, region
        )
        return out, record, Prepared(normed, means)

    def _forward_dense(
        self,
        x: Tensor,
        grid: tuple[int, int],
        extra: int,
        noise: Tensor | None,
        uniform: Tensor | None,
    ) -> tuple[Tensor, BlockRouting]:
        splits = self.dge.candidates
        pooled = compress_dense(x, splits, *grid, extra)
        means = self._pooled_means(pooled, grid)
        logits = self.dge.router(
            region_mean(x, grid, extra, self.dge.region) if means is None else means
        )
        choice, gate = self.dge.choose(logits, noise)
        if gate is None:
            gate = self.dge.one_hot(choice, logits.dtype)
        normed = self.norm1(pooled)
        # The finest candidate, when it comes first, makes the first N rows the tokens themselves.
        fine_first = splits[0] == self.dge.region
        keys = self.attn.keys(normed[:, : x.shape[1]] if fine_first else self.norm1(x), grid)
        if uniform is not None and uniform.ndim == 3:
            uniform = uniform[..., : pooled.shape[1]]
        update = self._update(pooled, normed, keys, uniform=uniform)
        out = decompress_dense(update, gate.to(update.dtype), splits, *grid, extra, reference=x)
        queries = extra + (gate.double() * query_table(grid, splits, x.device)).sum((1, 2, 3))
        record = self._record(x, grid, queries, choice, logits)
        record.computed = pooled.shape[1]
        return out, record

    def _forward_sparse(
        self,
        x: Tensor,
        grid: tuple[int, int],
        extra: int,
        noise: Tensor | None,
        uniform: Tensor | None,
    ) -> tuple[Tensor, BlockRouting]:
        splits = self.dge.candidates
        logits = self.dge.router(region_mean(x, grid, extra, self.dge.region))
        choice, gate = self.dge.choose(logits, noise)
        lengths = row_lengths(choice, splits, *grid, extra)
        host = HostCopy(lengths)
        # Keys need no choice: they are computed while the lengths travel to the host.
        keys = self.attn.keys(self.norm1(x), grid)
        counts, total, longest = host.counts(x.shape[1])
        plan = row_plan(choice, splits, *grid, extra, total=total)
        rows = PackedRows(plan, counts, longest)
        pooled = compress(x, plan, *grid, extra)
        if uniform is not None and uniform.ndim == 2:
            uniform = uniform.index_select(0, rows.image())
        elif uniform is not None:
            uniform = uniform[rows.image(), :, rows.number()]
        update = self._update(pooled, self.norm1(pooled), keys, rows, uniform)
        if gate is None:
            queries = lengths.double()
        else:
            update = update * self._row_gate(choice, gate, rows, grid).to(update.dtype)
            queries = extra + (gate.double() * query_table(grid, splits, x.device)).sum((1, 2, 3))
        out = decompress(update, plan, reference=x)
        return out, self._record(x, grid, queries, choice, logits)

    def _forward_front(
        self, x: Tensor, grid: tuple[int, int], extra: int
    ) -> tuple[Tensor, BlockRouting]:
        front = x[:, :extra]
        normed = self.norm1(x)
        out = front + self._update(front, normed[:, :extra], self.attn.keys(normed, grid))
        queries = torch.full((len(x),), float(extra), dtype=torch.float64, device=x.device)
        return out, self._record(x, grid, queries, None, None)

    def _pooled_means(self, pooled: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Return the region means if the last candidate (one query per region) pooled them."""
        if self.dge.candidates[-1] != 1:
            return None
        rows, columns = region_grid(*grid, self.dge.region)
        return pooled[:, -rows * columns :].unflatten(1, (rows, columns))

    def _update(
        self,
        tokens: Tensor,
        normed: Tensor,
        keys: tuple[Tensor, Tensor],
        rows: PackedRows | None = None,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """Return what the block adds to its queries, in their type (also under autocast)."""
        first, second = (None, None) if uniform is None else uniform.unbind(1)
        attended = drop_path(self.attn(normed, keys, rows), first, self.drop_path_rate).to(
            tokens.dtype
        )
        changed = drop_path(self.mlp(self.norm2(tokens + attended)), second, self.drop_path_rate)
        if torch.compiler.is_compiling():
            # A captured graph places its memory itself, and torch 2.6 refuses the form below in one.
            return attended + changed
        # Nothing else reads it, and fresh memory is dear on a CPU.
        return attended.add_(changed)

    def _row_gate(
        self, choice: Tensor, gate: Tensor, rows: PackedRows, grid: tuple[int, int]
    ) -> Tensor:
        """Return the gate of the chosen candidate for every packed row, 1 for extra tokens."""
        chosen = gate.gather(-1, choice.unsqueeze(-1)).flatten(1)
        table = torch.cat((chosen.new_ones(len(chosen), 1), chosen), dim=1)
        region = self.dge.region
        y, x = rows.plan.rows[:, 1], rows.plan.rows[:, 2]
        cell = (y // region) * region_grid(*grid, region)[1] + x // region + 1
        cell = torch.where(y < 0, torch.zeros_like(cell), cell)
        return table[rows.image(), cell].unsqueeze(-1)

    def _record(
        self,
        x: Tensor,
        grid: tuple[int, int],
        queries: Tensor,
        choice: Tensor | None,
        logits: Tensor | None,
    ) -> BlockRouting:
        static = self.cost(x.shape[1])
        cost = static if choice is not None else self.cost(x.shape[1], routed=False)
        return BlockRouting(cost, static, queries, choice, logits, grid, self.dge.candidates)


def _fused_sum_norm(x: Tensor, update: Tensor, norm: nn.LayerNorm) -> Tensor:
    return sum_norm(x, update, norm.weight, norm.bias, norm.eps)
