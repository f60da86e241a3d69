"""Region sampling fused with the layer norms around it, for inference: fewer launches, fewer bytes.

Each function equals a composition of `compress`, `decompress` and `layer_norm`, which has gradients;
these have none. Statistics of half precision are taken in float32 from values as they are stored.

Shape letters: B images, H x W token grid, E extra tokens in front, N = E + H * W, C channels,
Hr x Wr regions, L packed rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .region_sample import FLOATS, RowPlan, _check_float, _check_plan, _check_same, _fake, _note

_ops = torch.ops.patchreg


def sum_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of a sum that itself is not kept.

    Source: DGE, second norm of a block: the residual of a query is never read again.

    Args:
        x: rows.
        update: what is added to them.
        weight: weight of the norm.
        bias: bias of the norm.
        eps: added to the variance.

    Shape:
        x and update [..., C], weight and bias [C] -> [..., C].

    Raises:
        TypeError, ValueError: for arguments that do not fit together, or that need a gradient.
    """
    if x.shape != update.shape or not _norm_fits(x, (x, update), weight, bias):
        _check_float("x", x, x.ndim)
        if x.shape != update.shape:
            raise ValueError(
                f"update has shape {tuple(update.shape)}, x {tuple(x.shape)}; expected equal shapes."
            )
        _explain(x, {"update": update}, weight, bias)
    _note(x)
    return _ops.sum_norm(x, update, weight, bias, eps)


def compress_norm(
    x: Tensor, plan: RowPlan, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries of a plan as `compress` makes them, and their layer norm.

    Source: DGE, average pooling into the chosen granularity and the first norm of the block.

    Args:
        x: tokens, extra tokens first.
        plan: rows from `row_plan`.
        weight: weight of the norm.
        bias: bias of the norm.
        eps: added to the variance.

    Shape:
        x [B, N, C], weight and bias [C] -> pooled and normed [L, C].

    Raises:
        TypeError, ValueError: for arguments that do not fit together, or that need a gradient.
    """
    owner = _check_plan(plan, x)
    if x.ndim != 3 or x.shape[:2] != owner.shape or not _norm_fits(x, (x,), weight, bias):
        _check_tokens_of("x", x, owner)
        _explain(x, {}, weight, bias)
    _note(x)
    return _ops.region_pool_norm(x, plan.rows, owner, weight, bias, eps, *plan.grid)


def decompress_norm(
    first: Tensor,
    second: Tensor,
    plan: RowPlan,
    reference: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    region: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`decompress` of two updates at once, with the layer norm and the region means of the result.

    Source: DGE, broadcast of the block's update; first norm and router pooling of the next block.

    Args:
        first: one update per row of the plan.
        second: another one, added to it.
        plan: rows from `row_plan`.
        reference: tokens the updates are added to.
        weight: weight of the norm.
        bias: bias of the norm.
        eps: added to the variance.
        region: side of the regions in tokens; cut-off regions average the tokens they have.

    Shape:
        first and second [L, C], reference [B, N, C], weight and bias [C] -> out and normed
        [B, N, C], means [B, Hr, Wr, C] (float32 for half precision).

    Raises:
        TypeError, ValueError: for arguments that do not fit together, or that need a gradient.
    """
    owner = _check_plan(plan, reference)
    rows = (plan.rows.shape[0], reference.shape[-1])
    if not (
        reference.ndim == 3
        and reference.shape[:2] == owner.shape
        and first.shape == second.shape == rows
        and region >= 1
        and _norm_fits(reference, (reference, first, second), weight, bias)
    ):
        _check_tokens_of("reference", reference, owner)
        if region < 1:
            raise ValueError(f"region is {region}; expected at least 1. Pass its side in tokens.")
        for name, update in (("first", first), ("second", second)):
            if update.shape != rows:
                raise ValueError(
                    f"{name} has shape {tuple(update.shape)}; expected [L, C] = {rows}. "
                    "Pass updates of the rows of this plan."
                )
        _explain(reference, {"first": first, "second": second}, weight, bias)
    _note(reference)
    return _ops.region_unpool_norm(
        first, second, owner, reference, weight, bias, eps, region, *plan.grid
    )


def _norm_fits(x: Tensor, values: tuple[Tensor, ...], weight: Tensor, bias: Tensor) -> bool:
    """True when nothing speaks against the call; what does is said by `_explain`."""
    dtype, device = x.dtype, x.device
    if dtype not in FLOATS or not weight.shape == bias.shape == x.shape[-1:]:
        return False
    grad = torch.is_grad_enabled()
    for value in (*values, weight, bias):
        if value.dtype != dtype or value.device != device or (grad and value.requires_grad):
            return False
    return True


def _explain(x: Tensor, others: dict[str, Tensor], weight: Tensor, bias: Tensor) -> None:
    """Raises the error behind a call that does not fit."""
    for name, value in (*others.items(), ("weight", weight), ("bias", bias)):
        _check_same(name, value, "the tokens", x)
    for name, value in (("weight", weight), ("bias", bias)):
        if value.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; the norm of {x.shape[-1]} channels needs "
                f"[{x.shape[-1]}]. Pass the parameters of a LayerNorm over the channels."
            )
    raise ValueError(
        "the fused norms are for inference, but a tensor requires a gradient. Call inside "
        "torch.no_grad(), or use compress, decompress and layer_norm, which have gradients."
    )


def _check_tokens_of(name: str, x: Tensor, owner: Tensor) -> None:
    _check_float(name, x, 3)
    if x.shape[:2] != owner.shape:
        raise ValueError(
            f"{name} has {x.shape[0]} images of {x.shape[1]} tokens, the plan {owner.shape[0]} of "
            f"{owner.shape[1]}. Make the plan for this batch and grid."
        )


# ---- registration: fake kernels; there is no autograd ----


@_fake("sum_norm")
def _(x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_fake("region_pool_norm")
def _(x: Tensor, rows: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    pooled = x.new_empty(rows.shape[0], x.shape[2])
    return pooled, torch.empty_like(pooled)


@_fake("region_unpool_norm")
def _(
    first: Tensor,
    second: Tensor,
    owner: Tensor,
    reference: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    region: int,
    height: int,
    width: int,
    extra: int,
) -> tuple[Tensor, Tensor, Tensor]:
    out = reference.new_empty(reference.shape)
    cells = (-(-height // region), -(-width // region), reference.shape[2])
    dtype = torch.float32 if reference.dtype.itemsize < 4 else reference.dtype
    means = reference.new_empty(reference.shape[0], *cells, dtype=dtype)
    return out, torch.empty_like(out), means
