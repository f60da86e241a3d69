"""Plain PyTorch implementation of the region sampling operators, for any device.

It is the oracle of the tests and the fallback where no compiled kernel exists. Half precision sums
in float32 and rounds once. Nothing here reads the values of an accelerator's tensor on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def check_choice_range(choice: Tensor, splits: Sequence[int]) -> None:
    """Raises ValueError for a granularity index outside the candidates."""
    if choice.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(choice))
    if low < 0 or high >= len(splits):
        raise ValueError(
            f"choice holds {low if low < 0 else high}; expected indices 0..{len(splits) - 1} "
            f"into splits {tuple(splits)}. Pass the argmax of the router logits."
        )


def check_total(lengths: Tensor, total: int) -> None:
    """Raises ValueError when the caller's row count is not the number of rows."""
    rows = int(lengths.sum())
    if rows != total:
        raise ValueError(
            f"total is {total}, but the choice makes {rows} rows. "
            "Pass total=None or the sum of row_lengths()."
        )


def dense_grids(splits: Sequence[int], height: int, width: int) -> list[tuple[int, int, int]]:
    """Per split (step, rows, columns) of its raster map, without squares fully outside the grid."""
    region = max(splits)
    steps = [region // split for split in splits]
    return [(step, -(-height // step), -(-width // step)) for step in steps]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _extents(size: int, step: int, count: int, device: torch.device) -> Tensor:
    """Real tokens along one axis in each of `count` cells of `step` tokens."""
    return (size - step * torch.arange(count, device=device)).clamp(max=step)


def _region_rows(
    choice: Tensor, splits: Sequence[int], height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Step, queries per region and queries per line of the region, each [B, Hr, Wr]."""
    region = max(splits)
    step = torch.full_like(choice, region)
    for index, split in enumerate(splits):
        step = torch.where(choice == index, region // split, step)
    lines = (_extents(height, region, choice.shape[1], choice.device)[:, None] + step - 1) // step
    columns = (_extents(width, region, choice.shape[2], choice.device) + step - 1) // step
    return step, lines * columns, columns


def region_lengths(
    choice: Tensor, splits: Sequence[int], height: int, width: int, extra: int
) -> Tensor:
    """Queries of every image, [B] int64."""
    if choice.is_cpu:
        check_choice_range(choice, splits)
    return _region_rows(choice, splits, height, width)[1].sum((1, 2)) + extra


def region_route(
    logits: Tensor, splits: Sequence[int], height: int, width: int, extra: int
) -> tuple[Tensor, Tensor]:
    """Best candidate of every region [B, Hr, Wr] and queries of every image [B], int64."""
    choice = logits.argmax(dim=-1)
    return choice, _region_rows(choice, splits, height, width)[1].sum((1, 2)) + extra


def region_plan(
    choice: Tensor,
    splits: Sequence[int],
    height: int,
    width: int,
    extra: int,
    total: int,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [L, 4] (batch, y, x, step), lengths [B], owner [B, N] and starts [B + 1] of a layout."""
    if choice.is_cpu:
        check_choice_range(choice, splits)
    batch, device, region = choice.shape[0], choice.device, max(splits)
    step, counts, columns = _region_rows(choice, splits, height, width)
    lengths = counts.sum((1, 2)) + extra
    if choice.is_cpu and not padded:
        check_total(lengths, total)
    starts = F.pad(lengths.cumsum(0), (1, 0)).clamp(max=total).to(torch.int32)

    image_start = lengths.cumsum(0) - lengths
    flat = counts.flatten(1)
    start = (image_start[:, None] + extra + flat.cumsum(1) - flat).view_as(counts)

    y = torch.arange(height, device=device)[:, None]
    x = torch.arange(width, device=device)[None, :]
    token_step = step[:, y // region, x // region]
    line, column = y % region // token_step, x % region // token_step
    grid_owner = (
        start[:, y // region, x // region] + line * columns[:, y // region, x // region] + column
    )
    extra_owner = image_start[:, None] + torch.arange(extra, device=device)
    owner = torch.cat([extra_owner, grid_owner.flatten(1)], dim=1)

    # The first token a row covers, in raster order, is the corner of its square.
    tokens = extra + height * width
    ids = torch.arange(batch * tokens, device=device)
    if padded:  # Rows that no token has name the first token of the grid.
        room = max(total, batch * tokens)
        first = torch.full((room,), extra, device=device, dtype=ids.dtype)
        first = first.scatter_reduce_(0, owner.flatten(), ids, "amin", include_self=False)[:total]
        owner = owner.clamp(max=total - 1)
    else:
        first = ids.new_zeros(total).scatter_reduce_(
            0, owner.flatten(), ids, "amin", include_self=False
        )
    place = first % tokens if tokens else first
    cell = place - extra
    corner_y = torch.where(cell < 0, -1 - place, cell // width)
    corner_x = torch.where(cell < 0, 0, cell % width)
    all_steps = torch.cat([step.new_ones(batch, extra), token_step.flatten(1)], dim=1)
    steps = all_steps.flatten()[first]
    if padded:
        steps = torch.where(torch.arange(total, device=device) < starts[-1], steps, 1)
    rows = torch.stack([first // tokens, corner_y, corner_x, steps], dim=1)
    return rows, lengths, owner, starts


def _row_counts(rows: Tensor, height: int, width: int) -> Tensor:
    """Real tokens per row; 1 for extra tokens (their y is negative, their step 1)."""
    _, y, x, step = rows.unbind(1)
    return ((y + step).clamp(max=height) - y) * ((x + step).clamp(max=width) - x)


def region_pool(
    x: Tensor, rows: Tensor, owner: Tensor, height: int, width: int, extra: int, mean: bool
) -> Tensor:
    """Sum or mean of the tokens [B, N, C] that every row covers, [L, C]."""
    wide = x.to(_accumulator(x.dtype))
    pooled = wide.new_zeros(rows.shape[0], x.shape[2])
    pooled = pooled.index_add_(0, owner.flatten(), wide.flatten(0, 1))
    if mean:
        pooled = pooled / _row_counts(rows, height, width)[:, None]
    return pooled.to(x.dtype)


def region_unpool(
    update: Tensor,
    rows: Tensor,
    owner: Tensor,
    reference: Tensor | None,
    height: int,
    width: int,
    extra: int,
    mean: bool,
) -> Tensor:
    """Row of every token from packed rows [L, C], as they are or as shares of a mean, [B, N, C]."""
    wide = update.to(_accumulator(update.dtype))
    if mean:
        wide = wide / _row_counts(rows, height, width)[:, None]
    spread = wide.index_select(0, owner.flatten()).view(*owner.shape, update.shape[1])
    if reference is not None:
        spread = spread + reference
    return spread.to(update.dtype)


def region_pool_out(
    x: Tensor,
    rows: Tensor,
    owner: Tensor,
    height: int,
    width: int,
    extra: int,
    mean: bool,
    out: Tensor,
) -> None:
    """`region_pool` into a given tensor [L, C]."""
    out.copy_(region_pool(x, rows, owner, height, width, extra, mean))


def region_unpool_out(
    update: Tensor,
    rows: Tensor,
    owner: Tensor,
    reference: Tensor | None,
    height: int,
    width: int,
    extra: int,
    mean: bool,
    out: Tensor,
) -> None:
    """`region_unpool` into a given tensor [B, N, C]."""
    out.copy_(region_unpool(update, rows, owner, reference, height, width, extra, mean))


def _squares(cells: Tensor, step: int, rows: int, columns: int) -> Tensor:
    """Sums [B, H, W, C] over squares of `step` tokens, cut at the border: [B, rows, columns, C]."""
    batch, height, width, channels = cells.shape
    padded = F.pad(cells, (0, 0, 0, columns * step - width, 0, rows * step - height))
    return padded.view(batch, rows, step, columns, step, channels).sum((2, 4))


def _row_weight(
    gate: Tensor | None,
    index: int,
    geometry: tuple[int, int, int],
    region: int,
    size: tuple[int, int],
    like: Tensor,
) -> Tensor:
    """Weight of a token in each row of one split: the region's gate, or 1 / real tokens."""
    step, rows, columns = geometry
    device = like.device
    if gate is None:
        count_y = _extents(size[0], step, rows, device)
        count_x = _extents(size[1], step, columns, device)
        return (1 / (count_y[:, None] * count_x).to(like.dtype))[None, :, :, None]
    line = torch.arange(rows, device=device) * step // region
    column = torch.arange(columns, device=device) * step // region
    return gate[:, line[:, None], column[None, :], index, None].to(like.dtype)


def region_pool_dense(
    x: Tensor, gate: Tensor | None, splits: Sequence[int], height: int, width: int, extra: int
) -> Tensor:
    """`region_pool` for all granularities at once, [B, Nd, C]."""
    wide = x.to(_accumulator(x.dtype))
    cells = wide[:, extra:].unflatten(1, (height, width))
    parts = [wide[:, :extra]]
    for index, geometry in enumerate(dense_grids(splits, height, width)):
        weight = _row_weight(gate, index, geometry, max(splits), (height, width), wide)
        parts.append((_squares(cells, *geometry) * weight).flatten(1, 2))
    return torch.cat(parts, dim=1).to(x.dtype)


def region_unpool_dense(
    update: Tensor,
    gate: Tensor | None,
    reference: Tensor | None,
    splits: Sequence[int],
    height: int,
    width: int,
    extra: int,
) -> Tensor:
    """Gated sum over granularities of their rows [B, Nd, C], [B, N, C]."""
    wide = update.to(_accumulator(update.dtype))
    y = torch.arange(height, device=update.device)[:, None]
    x = torch.arange(width, device=update.device)[None, :]
    cells = wide.new_zeros(update.shape[0], height, width, update.shape[2])
    start = extra
    for index, geometry in enumerate(dense_grids(splits, height, width)):
        step, rows, columns = geometry
        part = wide[:, start : start + rows * columns].unflatten(1, (rows, columns))
        part = part * _row_weight(gate, index, geometry, max(splits), (height, width), wide)
        cells = cells + part[:, y // step, x // step]
        start += rows * columns
    out = torch.cat([wide[:, :extra], cells.flatten(1, 2)], dim=1)
    if reference is not None:
        out = out + reference
    return out.to(update.dtype)


def region_gate_dot(
    x: Tensor, update: Tensor, splits: Sequence[int], height: int, width: int, extra: int
) -> Tensor:
    """Gradient [B, Hr, Wr, S] of the gated sum with respect to the gate."""
    dtype = _accumulator(x.dtype)
    cells = x[:, extra:].to(dtype).unflatten(1, (height, width))
    region = max(splits)
    region_rows, region_columns = -(-height // region), -(-width // region)
    parts = []
    start = extra
    for step, rows, columns in dense_grids(splits, height, width):
        part = update[:, start : start + rows * columns].to(dtype).unflatten(1, (rows, columns))
        dot = (_squares(cells, step, rows, columns) * part).sum(-1, keepdim=True)
        parts.append(_squares(dot, region // step, region_rows, region_columns))
        start += rows * columns
    return torch.cat(parts, dim=-1).to(x.dtype)


def packed_attend(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float
) -> Tensor:
    """Softmax attention of the packed queries of each image over its keys [L, h * d]."""
    bounds = starts.tolist()
    parts = []
    for image, (first, last) in enumerate(zip(bounds[:-1], bounds[1:])):
        part = query[first:last].transpose(0, 1)
        parts.append(
            F.scaled_dot_product_attention(part, key[image], value[image], scale=scale)
            .transpose(0, 1)
            .flatten(1)
        )
    return torch.cat(parts) if parts else query.new_empty(0, query.shape[1] * query.shape[2])


def sum_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of x + update."""
    return F.layer_norm(x + update, weight.shape, weight, bias, eps)


def region_pool_norm(
    x: Tensor,
    rows: Tensor,
    owner: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    height: int,
    width: int,
    extra: int,
) -> tuple[Tensor, Tensor]:
    """Mean of the tokens that every row covers [L, C], and its layer norm."""
    pooled = region_pool(x, rows, owner, height, width, extra, True)
    return pooled, F.layer_norm(pooled, weight.shape, weight, bias, eps)


def region_unpool_norm(
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
    """Tokens plus both updates of their rows [B, N, C], its layer norm and its region means."""
    dtype = _accumulator(reference.dtype)
    update = first.to(dtype) + second.to(dtype)
    out = update.index_select(0, owner.flatten()).view(reference.shape) + reference
    out = out.to(reference.dtype)
    rows, columns = -(-height // region), -(-width // region)
    means = _squares(out[:, extra:].to(dtype).unflatten(1, (height, width)), region, rows, columns)
    lines = _extents(height, region, rows, out.device)[:, None]
    means = means / (lines * _extents(width, region, columns, out.device))[..., None]
    return out, F.layer_norm(out, weight.shape, weight, bias, eps), means
