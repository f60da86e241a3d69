"""Choosing windows for a whole batch, against a loop over positions."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from patchreg.benchmarks import figure, interleave
from patchreg.methods.anchornet.selector import choose_windows
from patchreg.methods.anchornet.trunk import Window

IMAGES, WINDOWS, LIMIT, SIDE, ROUNDS, REPEATS = 32, 5, 0.3, 17, 15, 20
WINDOW = Window(95, 8)


def overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Return the IoU of two boxes with inclusive corners, computed one by one.

    Args:
        a: Top, left, bottom, right.
        b: The same.
    """
    high = min(a[2], b[2]) - max(a[0], b[0])
    wide = min(a[3], b[3]) - max(a[1], b[1])
    if high <= 0 or wide <= 0:
        return 0.0
    shared = high * wide
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def by_position(cam: Tensor) -> list[int]:
    """Walk down one map position by position, as the official code does.

    Args:
        cam: One class activation map.

    Shape:
        cam [h, w].
    """
    columns = cam.shape[1]
    flat = cam.flatten()
    boxes: list[tuple[int, int, int, int]] = []
    cells: list[int] = []
    for place in flat.argsort(descending=True, stable=True):
        cell = int(place)
        y, x = cell // columns * WINDOW.stride, cell % columns * WINDOW.stride
        box = (y, x, y + WINDOW.side - 1, x + WINDOW.side - 1)
        if not boxes or all(overlap(box, other) <= LIMIT for other in boxes):
            boxes.append(box)
            cells.append(cell)
            if len(cells) == WINDOWS:
                break
    return cells


def maps(images: int, device: str) -> Tensor:
    """Return smooth random maps, as class activation maps are.

    Args:
        images: How many.
        device: Where.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(images, 1, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=SIDE, mode="bicubic")[:, 0]
    return (smooth + 0.05 * torch.randn(images, SIDE, SIDE, generator=generator)).to(device)


def run(device: str) -> list[dict[str, Any]]:
    """Time both on the same maps; on a GPU also a large batch, without a synchronisation.

    Args:
        device: `cpu` or `cuda`.
    """
    torch.set_num_threads(1)
    cam = maps(IMAGES, "cpu")
    limits = [LIMIT] * (WINDOWS - 1)

    def batch() -> Tensor:
        return choose_windows(cam, WINDOW, WINDOWS, limits)

    def loop() -> list[list[int]]:
        return [by_position(one) for one in cam]

    same = sum(int(a == b) for a, b in zip(batch().tolist(), loop()))
    if same != IMAGES:
        raise AssertionError(f"only {same} of {IMAGES} images get the boxes of the loop")

    def batches() -> None:
        for _ in range(REPEATS):
            batch()

    mine, theirs = (min(seconds) for seconds in interleave([batches, loop], ROUNDS))
    mine /= REPEATS
    rows = [
        figure(
            f"windows of {IMAGES} images, loop over positions / batch (boxes identical)",
            1e3 * mine,
            "ms CPU",
            baseline=1e3 * theirs,
            ratio=theirs / mine,
            goal=40.0,
            at_most=False,
        )
    ]
    if device == "cuda":
        rows.append(_on_gpu())
    return rows


def _on_gpu() -> dict[str, Any]:
    cam = maps(256, "cuda")
    limits = [LIMIT] * (WINDOWS - 1)
    expected = choose_windows(cam.cpu(), WINDOW, WINDOWS, limits)
    choose_windows(cam, WINDOW, WINDOWS, limits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = choose_windows(cam, WINDOW, WINDOWS, limits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if not torch.equal(found.cpu(), expected):
        raise AssertionError("the GPU chooses other windows than the CPU")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        choose_windows(cam, WINDOW, WINDOWS, limits)
    best = float("inf")
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            graph.replay()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / 20)
    return figure(
        "windows of 256 images, captured, no synchronisation",
        1e3 * best,
        "ms",
        0.2,
        5e3 * best,
        1.0,
    )
