"""Choosing windows on a class activation map, for a whole batch at once.

Letters: B images, h x w cells, P = h * w, K windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from patchreg.methods.anchornet.trunk import Window
from patchreg.registry import SELECTORS
from patchreg.utils.errors import ConfigError, DataError, InputTypeError


@lru_cache(maxsize=32)
def overlap_table(grid: tuple[int, int], window: Window, device: torch.device) -> Tensor:
    """Return the IoU of every two windows of a grid.

    Windows are taken as squares of `side - 1` px, the difference of their inclusive coordinates.

    Source:
        `calc_iou` of the official repository.

    Args:
        grid: Rows and columns.
        window: Geometry of the windows.
        device: Where the table lies.

    Shape:
        Returns [P, P] float64.
    """
    side = float(window.side - 1)
    rows, columns = (torch.arange(count, dtype=torch.float64) * window.stride for count in grid)
    high = (side - (rows[:, None] - rows[None]).abs()).clamp(min=0)
    wide = (side - (columns[:, None] - columns[None]).abs()).clamp(min=0)
    shared = high[:, None, :, None] * wide[None, :, None, :]
    table = shared / (2 * side * side - shared)
    cells = grid[0] * grid[1]
    return table.reshape(cells, cells).to(device)


def choose_windows(
    cam: Tensor,
    window: Window,
    count: int,
    limits: Sequence[float],
    official_first_cell: bool = False,
) -> Tensor:
    """Walk down each map once and take cells whose windows overlap little with those taken before.

    The first cell is the highest one. With n windows taken, a cell is taken when its IoU with each
    of them is at most `limits[n - 1]`; a cell passed over is not looked at again, so that fewer than
    `count` may be found. Equal values come in raster order. The number of operations depends on
    `count` alone and nothing waits for the device.

    Source:
        Section 3.2 of the paper; `localize_bbox` of the official repository.

    Args:
        cam: Class activation maps. On a device other than the CPU a map with values that are not
            finite gets no window instead of an error, which would need a synchronisation.
        window: Geometry of the cells.
        count: Windows K per image, at least 1.
        limits: Largest IoU for the second, third, ... window, each in [0, 1]; K - 1 are used.
        official_first_cell: Take cell 0 without a look at overlaps when the walk meets it, as the
            official code does by mistake.

    Shape:
        cam [B, h, w]; returns [B, K] int64 cells, -1 behind the last one.

    Raises:
        ConfigError: `count` or `limits` cannot be used.
        InputTypeError: The maps are not floating point.
        DataError: They have another shape or, on a CPU, hold values that are not finite.
    """
    check_limits(count, limits)
    if not cam.is_floating_point():
        raise InputTypeError(f"maps have type {cam.dtype}; expected a floating type")
    if cam.ndim != 3:
        raise DataError(f"maps have shape {tuple(cam.shape)}; expected [images, rows, columns]")
    cam = cam.detach()
    # A sum in float64 is finite when all its terms are.
    sound = cam.flatten(1).sum(1, dtype=torch.float64).isfinite()
    # A compiler captures no check of values.
    readable = cam.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not bool(sound.all()):
        raise DataError(
            f"the class activation map of image {int((~sound).nonzero()[0])} of the batch holds values "
            "that are not finite; the weights are damaged or training has diverged"
        )
    used = tuple(float(limit) for limit in limits[: count - 1])
    if len(set(used)) <= 1:
        limit = used[0] if used else 1.0
        return _constant_limit(cam, sound, window, count, limit, official_first_cell)
    return _varying_limits(cam, sound, window, used, official_first_cell)


def _constant_limit(
    cam: Tensor, sound: Tensor, window: Window, count: int, limit: float, first_cell: bool
) -> Tensor:
    """Take the highest cell again and again and strike out what overlaps it.

    With one limit for all steps, what is struck out once stays so, which is the single walk.
    """
    grid = (cam.shape[1], cam.shape[2])
    strike = _strike_table(grid, window, cam.device, cam.dtype, limit, first_cell)
    left = cam.flatten(1).clone()
    if cam.device.type != "cpu" or torch.compiler.is_compiling():
        left.masked_fill_(~sound[:, None], -torch.inf)
    found: list[tuple[Tensor, Tensor]] = []
    for step in range(count):
        if step:
            left.add_(strike.index_select(0, found[-1][1]))
        # Of equal values the first one is taken.
        best, cell = left.max(dim=1)
        found.append((best, cell))
    values, cells = (torch.stack(part, dim=1) for part in zip(*found))
    return torch.where(values > -torch.inf, cells, -1)


@lru_cache(maxsize=32)
def _strike_table(
    grid: tuple[int, int],
    window: Window,
    device: torch.device,
    dtype: torch.dtype,
    limit: float,
    first_cell: bool,
) -> Tensor:
    """Return for every cell what to add to the others: -inf where they, or itself, cannot follow it."""
    banned = overlap_table(grid, window, device) > limit
    if first_cell:
        banned[:, 0] = False
    return torch.where(banned.fill_diagonal_(True), -torch.inf, 0.0).to(dtype)


def _varying_limits(
    cam: Tensor, sound: Tensor, window: Window, limits: Sequence[float], first_cell: bool
) -> Tensor:
    """Walk down the sorted cells; a cell passed over under one limit is lost for the next."""
    table = overlap_table((cam.shape[1], cam.shape[2]), window, cam.device)
    order = cam.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(order.shape[1], device=cam.device)
    cell = order[:, :1]
    last = torch.zeros_like(cell)
    found = sound[:, None]
    overlap = table[cell[:, 0]]
    chosen = [torch.where(found, cell, -1)]
    for limit in limits:
        fits = overlap <= limit
        if first_cell:
            fits[:, 0] = True
        candidates = fits.gather(1, order) & (rank > last)
        # The highest score among the candidates is the first of them in rank order.
        best, at = candidates.byte().max(dim=1, keepdim=True)
        found = found & best.bool()
        last = torch.where(found, at, last)
        cell = order.gather(1, last)
        overlap = torch.where(found, torch.maximum(overlap, table[cell[:, 0]]), overlap)
        chosen.append(torch.where(found, cell, -1))
    return torch.cat(chosen, dim=1)


def check_limits(count: int, limits: Sequence[float]) -> None:
    """Refuse a number of windows and limits that do not go together.

    Args:
        count: Windows per image.
        limits: Largest IoU for the second, third, ... window.

    Raises:
        ConfigError: Says what is wrong.
    """
    if count < 1:
        raise ConfigError(f"num_patches={count}: expected at least 1")
    if len(limits) < count - 1:
        raise ConfigError(
            f"iou_limits={list(limits)} has {len(limits)} values; {count} windows need {count - 1}, one for "
            "each window after the first"
        )
    wrong = [limit for limit in limits if not 0 <= limit <= 1]
    if wrong:
        raise ConfigError(f"iou_limits={list(limits)}: {wrong[0]} lies outside [0, 1]")


def window_boxes(cells: Tensor, columns: int, window: Window) -> Tensor:
    """Return the boxes of cells, in px as (x0, y0, x1, y1), half-open; -1 where there is no cell.

    Args:
        cells: Cells, -1 for none.
        columns: Columns of the grid.
        window: Geometry of the cells.

    Shape:
        cells [B, K]; returns [B, K, 4] float32.
    """
    y = torch.div(cells, columns, rounding_mode="floor") * window.stride
    x = cells.remainder(columns) * window.stride
    boxes = torch.stack((x, y, x + window.side, y + window.side), dim=-1).float()
    return torch.where((cells >= 0).unsqueeze(-1), boxes, torch.full_like(boxes, -1.0))


@SELECTORS.register_module()
class CAMPatchSelector(nn.Module):
    """Greedy choice of windows on a class activation map under a limit on their overlap.

    On the 17 x 17 grid of the published trunk a constant limit of 0.3 always leaves room for 5
    windows, 0.2 for 4, 0.1 for 2 and 0 for 1.

    Source:
        Section 3.2 of the paper; `localize_bbox` of the official repository.

    Args:
        num_patches: Windows K per image.
        iou_limits: Largest IoU (in [0, 1]) of a new window with those before; one number for all
            steps or one for each window after the first.
        official_first_cell: As in `choose_windows`; for tables equal to the published ones.

    Raises:
        ConfigError: The limits cannot be used.

    Differs from official:
        All images at once, without waiting for the device at every cell. Fewer windows than asked
        for are marked, not an error.
    """

    def __init__(
        self,
        num_patches: int = 4,
        iou_limits: float | Sequence[float] = 0.3,
        official_first_cell: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(iou_limits, (int, float)):
            iou_limits = [float(iou_limits)] * max(num_patches - 1, 0)
        check_limits(num_patches, iou_limits)
        self.num_patches = num_patches
        self.iou_limits = tuple(float(limit) for limit in iou_limits)
        self.official_first_cell = official_first_cell

    def forward(self, cam: Tensor, window: Window) -> Tensor:
        """Choose windows.

        Args:
            cam: Class activation maps.
            window: Geometry of the cells.

        Shape:
            cam [B, h, w]; returns [B, K] int64 cells, -1 behind the last one.
        """
        return choose_windows(
            cam, window, self.num_patches, self.iou_limits, self.official_first_cell
        )
