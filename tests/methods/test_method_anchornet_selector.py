"""Choice of windows: the authors' boxes, a plain loop, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from anchornet_helpers import golden, inclusive
from torch import Tensor

from patchreg.methods.anchornet.selector import (
    CAMPatchSelector,
    choose_windows,
    overlap_table,
    window_boxes,
)
from patchreg.methods.anchornet.trunk import Window
from patchreg.utils.errors import ConfigError, DataError, InputTypeError

PUBLISHED = Window(95, 8)


def iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """IoU of inclusive boxes whose sides are differences of coordinates."""
    high = min(a[2], b[2]) - max(a[0], b[0])
    wide = min(a[3], b[3]) - max(a[1], b[1])
    if high <= 0 or wide <= 0:
        return 0.0
    shared = high * wide
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return shared / (areas - shared)


def by_loop(cam: Tensor, window: Window, count: int, limits: list[float], first: bool) -> list[int]:
    """The specification word for word: one walk down the sorted cells."""
    columns = cam.shape[1]
    order = np.argsort(-cam.flatten().double().numpy(), kind="stable")
    taken: list[int] = []

    def box(cell: int) -> tuple[int, ...]:
        y, x = cell // columns * window.stride, cell % columns * window.stride
        return (y, x, y + window.side - 1, x + window.side - 1)

    for cell in order.tolist():
        free = not taken or (first and cell == 0)
        if free or all(iou(box(cell), box(one)) <= limits[len(taken) - 1] for one in taken):
            taken.append(cell)
        if len(taken) == count:
            break
    return taken + [-1] * (count - len(taken))


def test_all_published_cases_give_the_published_boxes() -> None:
    file = golden("localize")
    cams, limits = file["cam"], file["iou_thresholds"]
    for case in range(len(cams)):
        rows, columns = int(file["grid_h"][case]), int(file["grid_w"][case])
        window = Window(int(file["patch"][case]), int(file["stride"][case]))
        count = int(file["max_boxes"][case])
        used = [limit for limit in limits[case].tolist() if limit >= 0]
        cam = cams[case, :rows, :columns]
        for rule in ("correct", "official"):
            cells = choose_windows(cam[None], window, count, used, rule == "official")
            found = inclusive(window_boxes(cells, columns, window))[0]
            expected = file[f"boxes_{rule}"][case, :count]
            assert torch.equal(found, expected), (case, rule)
            assert int((cells >= 0).sum()) == int(file[f"n_{rule}"][case])


def test_overlaps_are_the_published_ones() -> None:
    file = golden("geometry")
    table = overlap_table((17, 17), PUBLISHED, torch.device("cpu"))
    offsets = table.reshape(17, 17, 17, 17)[0, 0]
    assert torch.allclose(offsets, file["iou_by_offset"], rtol=0, atol=1e-12)
    for a, b, expected in zip(file["iou_a"].tolist(), file["iou_b"].tolist(), file["iou_ab"]):
        assert abs(iou(tuple(a), tuple(b)) - expected) <= 1e-12


@pytest.mark.parametrize("first", [False, True])
def test_a_batch_gives_what_a_loop_over_cells_gives(first: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    for number in range(60):
        rows, columns = (int(torch.randint(1, 19, (), generator=generator)) for _ in range(2))
        window = Window(
            int(torch.randint(8, 100, (), generator=generator)),
            int(torch.randint(1, 20, (), generator=generator)),
        )
        count = int(torch.randint(1, 8, (), generator=generator))
        limits = torch.rand(count, generator=generator).mul(0.8).tolist()
        cam = torch.randn(5, rows, columns, generator=generator)
        if number % 2:
            # Plateaus: many equal values, which come in raster order.
            cam = cam.mul(2).round()
        cells = choose_windows(cam, window, count, limits, first)
        expected = [by_loop(one, window, count, limits, first) for one in cam]
        assert cells.tolist() == expected


def test_an_overlap_equal_to_the_limit_is_accepted() -> None:
    table = overlap_table((1, 17), PUBLISHED, torch.device("cpu"))
    limit = float(table[0, 6])
    cam = torch.arange(17, 0, -1).float().view(1, 1, 17)
    assert choose_windows(cam, PUBLISHED, 2, [limit]).tolist() == [[0, 6]]
    assert choose_windows(cam, PUBLISHED, 2, [limit - 1e-9]).tolist() == [[0, 7]]


def test_a_cell_passed_over_is_not_looked_at_again() -> None:
    cam = torch.tensor([[[9.0, 8.0, 1.0, 7.0, 2.0]]])
    # Cell 1 overlaps cell 0 too much for the second window; for the third it would be allowed.
    assert choose_windows(cam, Window(41, 10), 3, [0.3, 0.9]).tolist() == [[0, 3, 4]]


def test_how_many_windows_always_fit() -> None:
    generator = torch.Generator().manual_seed(1)
    cam = torch.randn(400, 17, 17, generator=generator)
    for limit, least in ((0.0, 1), (0.1, 2), (0.2, 4), (0.3, 5)):
        cells = choose_windows(cam, PUBLISHED, 6, [limit] * 5)
        assert int((cells >= 0).sum(1).min()) >= least
    centred = -((torch.arange(17) - 8.0) ** 2)
    cells = choose_windows((centred[:, None] + centred)[None], PUBLISHED, 2, [0.0])
    assert cells.tolist() == [[144, -1]]


def test_what_cannot_be_is_said() -> None:
    cam = torch.zeros(2, 3, 3)
    with pytest.raises(ConfigError, match="num_patches=0"):
        CAMPatchSelector(0)
    with pytest.raises(ConfigError, match="2 values; 4 windows need 3"):
        CAMPatchSelector(4, [0.1, 0.2])
    with pytest.raises(ConfigError, match=r"1.5 lies outside \[0, 1\]"):
        CAMPatchSelector(3, [0.1, 1.5])
    with pytest.raises(ConfigError, match="nan lies outside"):
        CAMPatchSelector(2, float("nan"))
    with pytest.raises(DataError, match=r"\[images, rows, columns\]"):
        choose_windows(cam[0], PUBLISHED, 1, [])
    with pytest.raises(InputTypeError, match="floating"):
        choose_windows(cam.long(), PUBLISHED, 1, [])
    cam[1, 2, 0] = torch.inf
    with pytest.raises(DataError, match="image 1 of the batch"):
        choose_windows(cam, PUBLISHED, 1, [])


@pytest.mark.gpu
def test_the_gpu_chooses_the_same_without_a_synchronisation() -> None:
    generator = torch.Generator().manual_seed(5)
    cam = torch.randn(256, 17, 17, generator=generator)
    selector = CAMPatchSelector(5, 0.3)
    expected = selector(cam, PUBLISHED)
    there = cam.cuda()
    selector(there, PUBLISHED)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cells = selector(there, PUBLISHED)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(cells.cpu(), expected)
    there[3, 0, 0] = torch.nan
    assert selector(there, PUBLISHED)[3].tolist() == [-1] * 5
