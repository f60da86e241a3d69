"""Differentiable ranks of scores.

Letters: B rows, n scores of a row.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BACKENDS = ("auto", "torch", "torchsort")


def soft_rank(scores: Tensor, strength: float = 1.0, backend: str = "auto") -> Tensor:
    """Rank scores softly: 1 for the smallest, n for the largest, ties alike, rows summing to n(n+1)/2.

    The projection of `scores / strength` onto the permutahedron. Scores that lie more than `strength`
    apart get whole ranks; close ones get `(n+1)/2 + (score - mean) / strength`. The result and the
    gradient are exact, in closed form. Adding a number to a row changes nothing.

    Source:
        "Fast Differentiable Sorting and Ranking" (Blondel et al. 2020), L2 regularisation.

    Args:
        scores: One row per image, of any floating type; computed in float64, returned in its type.
        strength: Regularisation in the unit of the scores, above 0.
        backend: `torch` needs nothing else; `torchsort` is the C++ package of that name; `auto`
            takes it where it is installed and has kernels for the device, else `torch`.

    Shape:
        scores [B, n]; returns [B, n].

    Raises:
        TypeError: The scores are not floating.
        ValueError: Another shape, `strength` not above 0, or an unknown backend; on a CPU also scores
            that are not finite (elsewhere the check would wait for the device).
        ImportError: `torchsort` was asked for and is not installed, or lacks the device.
    """
    if not scores.is_floating_point():
        raise TypeError(f"scores have type {scores.dtype}; expected a floating type")
    if scores.ndim != 2:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; expected [rows, scores]")
    if not 0 < strength < math.inf:
        raise ValueError(f"strength={strength}: expected a number above 0, such as 1.0")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; expected one of {BACKENDS}")
    if scores.numel() == 0:
        return scores.clone()
    kernels = None if backend == "torch" else torchsort_kernels(scores.device.type)
    if kernels is None and backend == "torchsort":
        raise ImportError(
            f"torchsort is not installed with kernels for {scores.device.type}: pip install "
            "--no-build-isolation torchsort, or use backend='torch', which gives the same"
        )
    return _SoftRank.apply(scores, float(strength), kernels)


@functools.cache
def torchsort_kernels(device: str) -> Any:
    """Return torchsort's isotonic regression for a kind of device, or None without it.

    Args:
        device: `cpu` or `cuda`.
    """
    try:
        module = importlib.import_module(f"torchsort.isotonic_{device}")
    except ImportError:
        return None
    return module.isotonic_l2


def isotonic(values: Tensor) -> Tensor:
    """Fit the nearest non-increasing row to each row, in least squares.

    Source:
        Pool adjacent violators (Ayer et al. 1955).

    Args:
        values: Rows in float64.

    Shape:
        values [B, n]; returns [B, n].
    """
    if values.device.type == "cpu":
        return _pool_runs(values)
    return _pool_halves(values)


def _pool_runs(values: Tensor) -> Tensor:
    """Pool every run of neighbours that rise, all at once, until none does.

    A block is held as the position where it starts: its mean comes from running sums. A row has n + 1
    positions, so that a gap of one position divides the rows.
    """
    rows, count = values.shape
    sums = values.new_zeros(rows, count + 1)
    torch.cumsum(values, dim=1, out=sums[:, 1:])
    sums = sums.flatten()
    starts = torch.arange(len(sums))
    totals = sums
    edge = torch.zeros(rows, count + 1, dtype=torch.bool)
    edge[:, 0] = edge[:, -1] = True
    edge = edge.flatten()
    while True:
        lengths = starts.diff()
        means = totals.diff().div_(lengths)
        keep = edge.clone()
        keep[1:-1] |= means[1:] < means[:-1]
        left = keep.nonzero().squeeze(1)
        if len(left) == len(starts):
            break
        starts, totals, edge = (part.index_select(0, left) for part in (starts, totals, edge))
    filled = means.repeat_interleave(lengths, output_size=len(sums) - 1)
    return torch.cat((filled, filled[:1])).view(rows, count + 1)[:, :-1]


def _pool_halves(values: Tensor) -> Tensor:
    """Fit single values, then pairs, then fours: two fits side by side pool into one block at most.

    That block holds the left values below its mean m and the right values above it, and m is the zero
    of a falling function, so one look-up per value decides. A fixed number of operations of fixed
    sizes: nothing waits for the device.
    """
    rows, count = values.shape
    width = 1 << (count - 1).bit_length()
    low = values.amin(dim=1, keepdim=True) - 1.0
    fit = torch.cat((values, low.expand(rows, width - count)), dim=1).contiguous()
    length = 1
    while length < width:
        left, right = (half.contiguous() for half in fit.view(-1, 2, length).unbind(1))
        rising, falling = -left, -right
        zero = left.new_zeros(len(left), 1)
        behind = torch.cat((left.flip(1).cumsum(1).flip(1), zero), dim=1)
        before = torch.cat((zero, right.cumsum(1)), dim=1)
        # Equal values belong together, so each is looked up by the first of its kind.
        first = torch.searchsorted(rising, rising)
        above = torch.searchsorted(falling, rising)
        excess = behind.gather(1, first) + before.gather(1, above)
        low_left = excess - (length - first + above) * left > 0
        last = torch.searchsorted(falling, falling, right=True)
        below = torch.searchsorted(rising, falling, right=True)
        excess = behind.gather(1, below) + before.gather(1, last)
        high_right = excess - (length - below + last) * right < 0
        pooled = torch.cat((low_left, high_right), dim=1)
        both = torch.cat((left, right), dim=1)
        size = pooled.sum(dim=1, keepdim=True)
        mean = (both * pooled).sum(dim=1, keepdim=True) / size.clamp(min=1)
        fit = torch.where(pooled, mean, both).view(rows, width)
        length *= 2
    return fit[:, :count]


class _SoftRank(torch.autograd.Function):
    """Forward and backward of `soft_rank`."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, strength: float, kernels: Any) -> Tensor:
        count = scores.shape[1]
        ordered, order = scores.double().div(strength).sort(dim=1, descending=True)
        # Sorted, whatever is not finite lies at an end.
        if scores.device.type == "cpu" and not bool(torch.isfinite(ordered[:, [0, -1]]).all()):
            raise ValueError("scores hold values that are not finite; the model has diverged")
        if scores.device.type != "cpu" or bool((ordered[:, 0] - ordered[:, -1]).max() > 1e6):
            # Sums of far-off values lose digits. A gap beyond n + 1 counts like one of n + 1: whatever lies
            # on its two sides never shares a block.
            gaps = -ordered.diff(dim=1, prepend=ordered[:, :1])
            ordered = -gaps.clamp(max=count + 1.0).cumsum(dim=1)
        steps = torch.arange(count, 0, -1, dtype=torch.float64, device=scores.device)
        residual = ordered - steps
        fit = isotonic(residual) if kernels is None else kernels(residual)
        ctx.save_for_backward(order, fit)
        ctx.strength = strength
        ranks = torch.empty_like(ordered).scatter_(1, order, ordered - fit)
        return ranks.to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, fit = ctx.saved_tensors
        ordered = grad.double().gather(1, order)
        # Values of one block are equal; blocks lie one behind the other in the flat row.
        new = torch.ones_like(fit, dtype=torch.bool)
        new[:, 1:] = fit[:, 1:] != fit[:, :-1]
        block = new.flatten().cumsum(0).sub_(1)
        sums = ordered.new_zeros(2, fit.numel())
        sums[0].index_add_(0, block, ordered.flatten())
        sums[1].index_add_(0, block, torch.ones_like(ordered).flatten())
        means = (sums[0] / sums[1].clamp_(min=1.0)).index_select(0, block).view_as(ordered)
        found = torch.empty_like(ordered).scatter_(1, order, ordered - means)
        return found.div_(ctx.strength).to(grad.dtype), None, None
