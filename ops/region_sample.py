"""Region sampling: row plans, compress and decompress, in the packed and the dense variant.

Each region of r x r tokens (r = the largest split) is queried at one of the granularities `splits`
(queries per region side). Grids need not be divisible by r: the grid counts as padded on the right
and bottom, squares keep only their real tokens and a square without any does not exist.

Shape letters: B images, H x W token grid, E extra tokens in front, N = E + H * W, C channels,
Hr x Wr regions, S splits, L packed rows, Nd rows per image of the dense variant.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library, reference

MAX_SPLITS = 32
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RowPlan(NamedTuple):
    """Which query rows exist and which tokens they cover.

    Source: DGE, packed layout of the queries (order of the official kernels: batch, y, x, step).

    Args:
        rows: one row per query (batch, y, x, step), the top left token of its square and the
            square's side in tokens; extra token t of image b is (b, -1 - t, 0, 1).
        lengths: queries per image.
        owner: row covering each token; None for the dense variant, where every token has one row
            per split.
        grid: (height, width, extra tokens) of the images in tokens.
        starts: first row of every image, then the number of rows; None for the dense variant.

    Shape:
        rows [L, 4], lengths [B], owner [B, N], all int64; starts [B + 1] int32.
    """

    rows: Tensor
    lengths: Tensor
    owner: Tensor | None
    grid: tuple[int, int, int]
    starts: Tensor | None = None


_ops = torch.ops.patchreg


def region_grid(height: int, width: int, region: int) -> tuple[int, int]:
    """Number of regions along each side of the grid, the last ones possibly cut off.

    Args:
        height: grid height in tokens.
        width: grid width in tokens.
        region: region side in tokens, at least 1.

    Raises:
        ValueError: for a size below 1.
    """
    for name, value in (("height", height), ("width", width), ("region", region)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1. Pass sizes in tokens.")
    return -(-height // region), -(-width // region)


def row_lengths(
    choice: Tensor, splits: Sequence[int], height: int, width: int, extra: int
) -> Tensor:
    """Queries per image of a choice, without waiting for the device.

    Args:
        choice: index into `splits` for every region.
        splits: queries per region side of each candidate, in the router's order.
        height: grid height in tokens.
        width: grid width in tokens.
        extra: tokens in front of the grid.

    Shape:
        choice [B, Hr, Wr] int64 -> [B] int64.

    Raises:
        TypeError, ValueError: for arguments that do not fit together.
    """
    splits = _check_geometry(splits, height, width, extra)
    _check_choice(choice, splits, height, width)
    _note(choice)
    if _debugs(choice):
        reference.check_choice_range(choice, splits)
    return _ops.region_lengths(choice, splits, height, width, extra)


def route(
    logits: Tensor, splits: Sequence[int], height: int, width: int, extra: int
) -> tuple[Tensor, Tensor]:
    """Best candidate of every region and what it makes of each image, without waiting for the device.

    Source: DGE, argmax of the router in evaluation; the lowest index on ties.

    Args:
        logits: score of every candidate in every region.
        splits: queries per region side of each candidate, in the router's order.
        height: grid height in tokens.
        width: grid width in tokens.
        extra: tokens in front of the grid.

    Shape:
        logits [B, Hr, Wr, S] -> choice [B, Hr, Wr] and queries per image [B], both int64.

    Raises:
        TypeError, ValueError: for arguments that do not fit together.
    """
    splits = _check_geometry(splits, height, width, extra)
    _check_float("logits", logits, 4)
    if logits.shape[1:] != (*region_grid(height, width, max(splits)), len(splits)):
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}; a {height}x{width} grid and splits {splits} "
            f"need [B, {', '.join(map(str, region_grid(height, width, max(splits))))}, "
            f"{len(splits)}]. Pass one score per region and split."
        )
    _note(logits)
    return _ops.region_route(logits, splits, height, width, extra)


def row_plan(
    choice: Tensor,
    splits: Sequence[int],
    height: int,
    width: int,
    extra: int,
    total: int | None = None,
    padded: bool = False,
) -> RowPlan:
    """Packed rows of a choice: images in order, extra tokens first, then regions in raster order.

    Source: DGE, packed layout (index to rows) of the official kernels.

    Args:
        choice: index into `splits` for every region.
        splits: queries per region side of each candidate, in the router's order.
        height: grid height in tokens.
        width: grid width in tokens.
        extra: tokens in front of the grid.
        total: number of rows L when known (the sum of `row_lengths`); the call then never waits for
            the device. None costs one wait on an accelerator.
        padded: `total` is a capacity, so that shapes do not depend on the choice (for captured
            graphs). Rows beyond the real ones are single tokens, the first of the grid. Where the
            choice makes more rows than that, the surplus has none and its tokens are given the last
            row: compare the sum of `lengths` with the capacity.

    Shape:
        choice [B, Hr, Wr] int64 -> rows [L, 4], lengths [B], owner [B, N].

    Raises:
        TypeError, ValueError: for arguments that do not fit together; on an accelerator index
            values and `total` are only checked with PATCHREG_OPS_DEBUG=1, which waits for it.

    Differs from official:
        the x column of extra rows is 0 (uninitialised there); grids that the region does not divide
        are clipped instead of leaving rows uninitialised; the lengths stay on the device.
    """
    splits = _check_geometry(splits, height, width, extra)
    if total is None:
        if padded:
            raise ValueError("a padded plan needs total, the capacity in rows.")
        total = int(row_lengths(choice, splits, height, width, extra).sum())
    else:
        _check_choice(choice, splits, height, width)
        _note(choice)
        if torch.compiler.is_compiling():
            torch._check(total >= 0)
        elif total < padded:
            raise ValueError(
                f"total is {total}; expected the number of rows. Pass None to have it counted."
            )
        elif total and not len(choice):
            raise ValueError(f"total is {total}, but a batch without images makes no rows.")
        if _debugs(choice) and not padded:
            lengths = row_lengths(choice, splits, height, width, extra)
            reference.check_total(lengths, total)
    rows, lengths, owner, starts = _ops.region_plan(
        choice, splits, height, width, extra, total, padded
    )
    return RowPlan(rows, lengths, owner, (height, width, extra), starts)


def dense_row_plan(
    batch: int,
    splits: Sequence[int],
    height: int,
    width: int,
    extra: int,
    device: torch.device | str,
) -> RowPlan:
    """Rows of the dense variant: per image the extra tokens, then the raster map of every split.

    Args:
        batch: number of images.
        splits: queries per region side of each candidate, in the router's order.
        height: grid height in tokens.
        width: grid width in tokens.
        extra: tokens in front of the grid.
        device: where the plan is built.

    Shape:
        rows [B * Nd, 4], lengths [B], owner None.

    Raises:
        TypeError, ValueError: for arguments that do not fit together.
    """
    splits = _check_geometry(splits, height, width, extra)
    if batch < 0:
        raise ValueError(f"batch is {batch}; expected 0 or more. Pass the number of images.")
    token = torch.arange(extra, device=device)
    parts = [torch.stack([-1 - token, torch.zeros_like(token), torch.ones_like(token)], dim=1)]
    for step, rows, columns in reference.dense_grids(splits, height, width):
        y = torch.arange(rows, device=device) * step
        x = torch.arange(columns, device=device) * step
        cell = torch.meshgrid(y, x, indexing="ij")
        parts.append(torch.stack([*cell, torch.full_like(cell[0], step)], dim=-1).flatten(0, 1))
    image = torch.cat(parts)
    count = image.shape[0]
    index = torch.arange(batch, device=device)[:, None, None].expand(-1, count, 1)
    rows4 = torch.cat([index, image[None].expand(batch, -1, -1)], dim=2).reshape(batch * count, 4)
    lengths = torch.full((batch,), count, dtype=torch.int64, device=device)
    return RowPlan(rows4, lengths, None, (height, width, extra))


def compress(
    x: Tensor, plan: RowPlan, height: int, width: int, extra: int, out: Tensor | None = None
) -> Tensor:
    """Queries of a plan: the mean of the real tokens each row covers; extra tokens pass through.

    Source: DGE, average pooling into the chosen granularity.

    Args:
        x: tokens, extra tokens first.
        plan: rows from `row_plan`.
        height: grid height in tokens.
        width: grid width in tokens.
        extra: tokens in front of the grid.
        out: contiguous tensor the result is written to and returned as, without gradient.

    Shape:
        x [B, N, C] float -> [L, C] of the same dtype; float16 and bfloat16 sum in float32 and round
        once.

    Raises:
        TypeError, ValueError: for arguments that do not fit together.
    """
    _check_tokens("x", x, height, width, extra)
    owner = _check_plan(plan, x)
    if plan.grid != (height, width, extra) or owner.shape[0] != x.shape[0]:
        raise ValueError(
            f"the plan covers {owner.shape[0]} images of (height, width, extra) {plan.grid}, x has "
            f"{x.shape[0]} of {(height, width, extra)}. Make the plan for this batch and grid."
        )
    _note(x)
    if out is None:
        return _ops.region_pool(x, plan.rows, owner, height, width, extra, True)
    _check_out(out, (plan.rows.shape[0], x.shape[2]), x)
    _ops.region_pool_out(x, plan.rows, owner, height, width, extra, True, out)
    return out


def decompress(
    update: Tensor, plan: RowPlan, reference: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Copies the update of every row to the tokens it covers and adds the reference.

    Source: DGE, broadcast of the block's update.

    Args:
        update: one update per row of the plan.
        plan: rows from `row_plan`.
        reference: tokens the update is added to, or None.
        out: contiguous tensor the result is written to and returned as, without gradient; it may be
            `reference` itself, not `update`.

    Shape:
        update [L, C], reference [B, N, C] -> [B, N, C].

    Raises:
        TypeError, ValueError: for arguments that do not fit together.

    Differs from official:
        the incoming gradient is never edited; the gradient of a row is one sum, without the detour
        over a mean.
    """
    _check_float("update", update, 2)
    owner = _check_plan(plan, update)
    if update.shape[0] != plan.rows.shape[0]:
        raise ValueError(
            f"update has {update.shape[0]} rows, the plan {plan.rows.shape[0]}. "
            "Pass the plan that made these rows."
        )
    _check_reference(reference, update, (*owner.shape, update.shape[1]))
    _note(update)
    if out is None:
        return _ops.region_unpool(update, plan.rows, owner, reference, *plan.grid, False)
    _check_out(out, (*owner.shape, update.shape[1]), update, reference)
    _ops.region_unpool_out(update, plan.rows, owner, reference, *plan.grid, False, out)
    return out


def compress_dense(x: Tensor, splits: Sequence[int], height: int, width: int, extra: int) -> Tensor:
    """Queries of all granularities at once: the extra tokens, then the pooled map of every split.

    Source: DGE, dense training path.

    Args:
        x: tokens, extra tokens first.
        splits: queries per region side of each candidate, in the router's order.
        height: grid height in tokens.
        width: grid width in tokens.
        extra: tokens in front of the grid.

    Shape:
        x [B, N, C] -> [B, Nd, C], rows in the order of `dense_row_plan`.

    Raises:
        TypeError, ValueError: for arguments that do not fit together.
    """
    splits = _check_geometry(splits, height, width, extra)
    _check_tokens("x", x, height, width, extra)
    _note(x)
    return _ops.region_pool_dense(x, None, splits, height, width, extra)


def decompress_dense(
    update: Tensor,
    gate: Tensor,
    splits: Sequence[int],
    height: int,
    width: int,
    extra: int,
    reference: Tensor | None = None,
) -> Tensor:
    """Gated sum over granularities of the upsampled updates, plus the reference.

    out = reference + sum_k gate_k * up(u_k); extra tokens are reference + u, not gated.

    Source: DGE, dense training path.

    Args:
        update: updates of all granularities, rows in the order of `dense_row_plan`.
        gate: weight of every granularity in every region, any real number.
        splits: queries per region side of each candidate, in the router's order.
        height: grid height in tokens.
        width: grid width in tokens.
        extra: tokens in front of the grid.
        reference: tokens the update is added to, or None.

    Shape:
        update [B, Nd, C], gate [B, Hr, Wr, S], reference [B, N, C] -> [B, N, C].

    Raises:
        TypeError, ValueError: for arguments that do not fit together.
    """
    splits = _check_geometry(splits, height, width, extra)
    _check_float("update", update, 3)
    rows = extra + sum(ny * nx for _, ny, nx in _grids(splits, height, width))
    if update.shape[1] != rows:
        raise ValueError(
            f"update has {update.shape[1]} rows per image; splits {splits} on a {height}x{width} "
            f"grid with {extra} extra tokens make {rows}. Pass rows made from compress_dense."
        )
    _check_float("gate", gate, 4)
    expected = (update.shape[0], *region_grid(height, width, max(splits)), len(splits))
    if tuple(gate.shape) != expected:
        raise ValueError(
            f"gate has shape {tuple(gate.shape)}; expected [B, Hr, Wr, S] = {expected}. "
            "Pass one weight per region and split."
        )
    _check_same("gate", gate, "update", update)
    _check_reference(reference, update, (update.shape[0], extra + height * width, update.shape[2]))
    _note(update)
    return _ops.region_unpool_dense(update, gate, reference, splits, height, width, extra)


def _note(tensor: Tensor) -> None:
    if not torch.compiler.is_compiling():
        _library.note_device(tensor.device.type)


def _debugs(tensor: Tensor) -> bool:
    """True when an accelerator's values are to be read; the kernels check a CPU's on their own."""
    if torch.compiler.is_compiling() or tensor.is_cpu:
        return False
    return os.environ.get("PATCHREG_OPS_DEBUG") == "1"


def _check_geometry(splits: Sequence[int], height: int, width: int, extra: int) -> tuple[int, ...]:
    if isinstance(splits, Tensor) or not isinstance(splits, Sequence):
        raise TypeError(
            f"splits is a {type(splits).__name__}; expected a tuple of Python ints such as "
            "(4, 2, 1), so that no device value has to be read."
        )
    splits = tuple(splits)
    for split in splits:
        if isinstance(split, bool) or not isinstance(split, int):
            raise TypeError(f"splits holds {split!r}; expected Python ints such as (4, 2, 1).")
    if splits not in _known_splits or torch.compiler.is_compiling():
        _check_splits(splits)
        _known_splits.add(splits)
    if height < 1 or width < 1:
        region_grid(height, width, max(splits))
    if extra < 0:
        _check_extra(extra)
    return splits


# Candidates that were found good: the check is dear beside a small launch.
_known_splits: set[tuple[int, ...]] = set()


def _check_splits(splits: tuple[int, ...]) -> None:
    if not 1 <= len(splits) <= MAX_SPLITS:
        raise ValueError(
            f"splits has {len(splits)} entries; expected 1..{MAX_SPLITS}. "
            "Give the queries per region side of each candidate."
        )
    if min(splits) < 1:
        raise ValueError(
            f"splits {splits} holds {min(splits)}; expected positive queries per side."
        )
    if len(set(splits)) != len(splits):
        raise ValueError(f"splits {splits} holds a value twice; give every granularity once.")
    bad = [split for split in splits if max(splits) % split]
    if bad:
        raise ValueError(
            f"split {bad[0]} of splits {splits} does not divide the region side {max(splits)}; "
            "use divisors of the largest split."
        )


def _check_extra(extra: int) -> None:
    if extra < 0:
        raise ValueError(
            f"extra is {extra}; expected 0 or more. Pass the number of tokens in front of the grid."
        )


def _check_choice(choice: Tensor, splits: tuple[int, ...], height: int, width: int) -> None:
    if not isinstance(choice, Tensor) or choice.dtype != torch.int64:
        kind = choice.dtype if isinstance(choice, Tensor) else type(choice).__name__
        raise TypeError(f"choice is {kind}; expected an int64 tensor, as argmax returns it.")
    grid = region_grid(height, width, max(splits))
    if choice.ndim != 3 or tuple(choice.shape[1:]) != grid:
        raise ValueError(
            f"choice has shape {tuple(choice.shape)}; a {height}x{width} grid with regions of side "
            f"{max(splits)} needs [B, {grid[0]}, {grid[1]}]. Pass one index per region."
        )


def _check_float(name: str, tensor: Tensor, ndim: int) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(
            f"{name} is {kind}; expected a float64/32/16 or bfloat16 tensor. Convert it first."
        )
    if tensor.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {ndim} dimensions.")


def _check_tokens(name: str, x: Tensor, height: int, width: int, extra: int) -> None:
    region_grid(height, width, 1)
    _check_extra(extra)
    _check_float(name, x, 3)
    if x.shape[1] != extra + height * width:
        raise ValueError(
            f"{name} has {x.shape[1]} tokens; {extra} extra tokens and a {height}x{width} grid make"
            f" {extra + height * width}. Pass the grid of these tokens."
        )


def _check_plan(plan: RowPlan, tensor: Tensor) -> Tensor:
    """Checks the plan against the tensor it is used with and returns its owner map."""
    if not isinstance(plan, RowPlan):
        raise TypeError(f"plan is a {type(plan).__name__}; expected the RowPlan of row_plan().")
    if plan.owner is None:
        raise ValueError(
            "plan is a dense plan (owner None), in which a token has several rows. "
            "Use compress_dense and decompress_dense."
        )
    if plan.rows.device != tensor.device:
        raise ValueError(
            f"the plan is on {plan.rows.device}, the tensor on {tensor.device}; "
            "make the plan from a choice on the tensor's device."
        )
    return plan.owner


def _check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} is {tensor.dtype}, {other_name} is {other.dtype}; expected one dtype. "
            f"Convert with {name}.to({other_name}.dtype)."
        )
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device}, {other_name} on {other.device}; expected one device. "
            f"Move with {name}.to({other_name}.device)."
        )


def _check_reference(reference: Tensor | None, update: Tensor, shape: tuple[int, ...]) -> None:
    if reference is None:
        return
    _check_float("reference", reference, 3)
    if tuple(reference.shape) != shape:
        raise ValueError(
            f"reference has shape {tuple(reference.shape)}; expected [B, N, C] = {shape}. "
            "Pass the tokens that were compressed."
        )
    _check_same("reference", reference, "update", update)


def _check_out(out: Tensor, shape: tuple[int, ...], *inputs: Tensor | None) -> None:
    given = [tensor for tensor in inputs if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (out, *given)):
        raise ValueError(
            "out= is for inference, but a tensor requires a gradient. "
            "Leave out= away or call inside torch.no_grad()."
        )
    if tuple(out.shape) != shape or not out.is_contiguous():
        raise ValueError(
            f"out has shape {tuple(out.shape)} and strides {out.stride()}; expected a contiguous "
            f"tensor {shape}. Allocate it with torch.empty."
        )
    _check_same("out", out, "the input", given[0])


def _grids(splits: Sequence[int], height: int, width: int) -> list[tuple[int, int, int]]:
    return reference.dense_grids(splits, height, width)


# ---- registration: reference kernels, fake kernels, autograd ----

for _name in _library.SCHEMAS:  # Those of fused.py too.
    _library.library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"{_library.NAMESPACE}::{name}", lib=_library.library)


@_fake("region_lengths")
def _(choice: Tensor, splits: Sequence[int], height: int, width: int, extra: int) -> Tensor:
    return choice.new_empty(choice.shape[0])


@_fake("region_route")
def _(
    logits: Tensor, splits: Sequence[int], height: int, width: int, extra: int
) -> tuple[Tensor, Tensor]:
    choice = logits.new_empty(logits.shape[:3], dtype=torch.int64)
    return choice, choice.new_empty(choice.shape[0])


@_fake("region_plan")
def _(
    choice: Tensor,
    splits: Sequence[int],
    height: int,
    width: int,
    extra: int,
    total: int,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = choice.shape[0]
    owner = choice.new_empty(batch, extra + height * width)
    starts = choice.new_empty(batch + 1, dtype=torch.int32)
    return choice.new_empty(total, 4), choice.new_empty(batch), owner, starts


@_fake("region_pool")
def _(
    x: Tensor, rows: Tensor, owner: Tensor, height: int, width: int, extra: int, mean: bool
) -> Tensor:
    return x.new_empty(rows.shape[0], x.shape[2])


@_fake("region_unpool")
def _(
    update: Tensor,
    rows: Tensor,
    owner: Tensor,
    reference: Tensor | None,
    height: int,
    width: int,
    extra: int,
    mean: bool,
) -> Tensor:
    return update.new_empty(*owner.shape, update.shape[1])


@_fake("region_pool_dense")
def _(
    x: Tensor, gate: Tensor | None, splits: Sequence[int], height: int, width: int, extra: int
) -> Tensor:
    rows = extra + sum(ny * nx for _, ny, nx in _grids(splits, height, width))
    return x.new_empty(x.shape[0], rows, x.shape[2])


@_fake("region_unpool_dense")
def _(
    update: Tensor,
    gate: Tensor | None,
    reference: Tensor | None,
    splits: Sequence[int],
    height: int,
    width: int,
    extra: int,
) -> Tensor:
    return update.new_empty(update.shape[0], extra + height * width, update.shape[2])


@_fake("region_gate_dot")
def _(
    x: Tensor, update: Tensor, splits: Sequence[int], height: int, width: int, extra: int
) -> Tensor:
    return x.new_empty(x.shape[0], *region_grid(height, width, max(splits)), len(splits))


@_fake("region_pool_out")
@_fake("region_unpool_out")
def _(*arguments: Any) -> None:
    return None


# Pool and unpool are each other's adjoint, so each one's backward is the other and any order of
# derivative exists. The rows take no gradient.


def _pool_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, rows, owner, *ctx.geometry = inputs
    ctx.save_for_backward(rows, owner)


def _pool_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, owner = ctx.saved_tensors
    return _ops.region_unpool(grad, rows, owner, None, *ctx.geometry), *[None] * 6


def _unpool_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, rows, owner, _, *ctx.geometry = inputs
    ctx.save_for_backward(rows, owner)


def _unpool_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, owner = ctx.saved_tensors
    update = _ops.region_pool(grad, rows, owner, *ctx.geometry) if ctx.needs_input_grad[0] else None
    return update, None, None, grad if ctx.needs_input_grad[3] else None, *[None] * 4


def _pool_dense_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, *ctx.geometry = inputs
    ctx.save_for_backward(x if gate is not None else None, gate)


def _pool_dense_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, gate = ctx.saved_tensors
    needs_x, needs_gate = ctx.needs_input_grad[:2]
    gx = _ops.region_unpool_dense(grad, gate, None, *ctx.geometry) if needs_x else None
    ggate = _ops.region_gate_dot(x, grad, *ctx.geometry) if needs_gate else None
    return gx, ggate, *[None] * 4


def _unpool_dense_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    update, gate, _, *ctx.geometry = inputs
    ctx.save_for_backward(update if gate is not None else None, gate)


def _unpool_dense_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    update, gate = ctx.saved_tensors
    needs_update, needs_gate, needs_reference = ctx.needs_input_grad[:3]
    gu = _ops.region_pool_dense(grad, gate, *ctx.geometry) if needs_update else None
    ggate = _ops.region_gate_dot(grad, update, *ctx.geometry) if needs_gate else None
    return gu, ggate, grad if needs_reference else None, *[None] * 4


def _gate_dot_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, update, *ctx.geometry = inputs
    ctx.save_for_backward(x, update)


def _gate_dot_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, update = ctx.saved_tensors
    extra = ctx.geometry[-1]

    def without_extra(rows: Tensor) -> Tensor:  # Extra tokens are not gated, so they take no part.
        return F.pad(rows[:, extra:], (0, 0, extra, 0))

    gx = _ops.region_unpool_dense(without_extra(update), grad, None, *ctx.geometry)
    gu = _ops.region_pool_dense(without_extra(x), grad, *ctx.geometry)
    return gx, gu, *[None] * 4


for _name, _context, _backward in (
    ("region_pool", _pool_context, _pool_backward),
    ("region_unpool", _unpool_context, _unpool_backward),
    ("region_pool_dense", _pool_dense_context, _pool_dense_backward),
    ("region_unpool_dense", _unpool_dense_context, _unpool_dense_backward),
    ("region_gate_dot", _gate_dot_context, _gate_dot_backward),
):
    torch.library.register_autograd(
        f"{_library.NAMESPACE}::{_name}", _backward, setup_context=_context, lib=_library.library
    )
