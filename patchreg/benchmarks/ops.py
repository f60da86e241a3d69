"""Compress and decompress of region sampling, beside a copy of as many bytes and library calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import patchreg_ops
import torch
import torch.nn.functional as F

from patchreg.benchmarks import figure, interleave

HEIGHT = WIDTH = 16
EXTRA, CHANNELS, SPLITS = 1, 384, (4, 2, 1)
SHARES = (0.4, 0.2, 0.4)  # of the granularities: about 125 queries of 257 tokens
ROUNDS = 15
GOALS = {"cpu": (1.5, 2.0), "cuda": (1.3, 1.3)}


def _copy(count: int, like: torch.Tensor) -> Callable[[], Any]:
    """A copy that reads and writes `count` elements in all."""
    source = torch.ones(count // 2, dtype=like.dtype, device=like.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


@torch.no_grad()
def run(device: str) -> list[dict[str, Any]]:
    """Measure DeiT-S shapes with reused outputs: 64 images in float32, on CUDA 256 in bfloat16.

    Args:
        device: `cpu` (process CPU time) or `cuda` (wall clock of 20 launches).

    Returns:
        Figures of `patchreg.benchmarks`, each against a copy that moves the same bytes.
    """
    batch, dtype = (256, torch.bfloat16) if device == "cuda" else (64, torch.float32)
    generator = torch.Generator().manual_seed(0)
    side = HEIGHT // max(SPLITS)
    choice = torch.multinomial(torch.tensor(SHARES), batch * side * side, True, generator=generator)
    choice = choice.view(batch, side, side).to(device)
    grid = (HEIGHT, WIDTH, EXTRA)
    plan = patchreg_ops.row_plan(choice, SPLITS, *grid)
    x = torch.randn(batch, EXTRA + HEIGHT * WIDTH, CHANNELS, generator=generator).to(device, dtype)
    rows = torch.empty(len(plan.rows), CHANNELS, dtype=dtype, device=device)
    update, out, tokens = torch.ones_like(rows), torch.empty_like(x), x.view(-1, CHANNELS)
    assert plan.owner is not None
    owner = plan.owner.flatten()
    order, sizes = owner.argsort(stable=True), owner.bincount()
    starts = sizes.cumsum(0) - sizes
    calls: dict[str, Callable[[], Any]] = {
        "copy, compress": _copy(x.numel() + rows.numel(), x),
        "compress": lambda: patchreg_ops.compress(x, plan, *grid, out=rows),
        "compress, embedding_bag": lambda: F.embedding_bag(order, tokens, starts, mode="mean"),
        "compress, index_add": lambda: (
            rows.zero_().index_add_(0, owner, tokens).div_(sizes[:, None])
        ),
        "copy, decompress": _copy(2 * x.numel() + rows.numel(), x),
        "decompress": lambda: patchreg_ops.decompress(update, plan, x, out=out),
        "decompress, index_select": lambda: torch.index_select(
            update, 0, owner, out=out.view(-1, CHANNELS)
        ).add_(tokens),
        "row plan": lambda: patchreg_ops.row_plan(choice, SPLITS, *grid, total=len(rows)),
    }
    if device == "cuda":
        seconds = [
            [value / 20 for value in times]
            for times in interleave(
                [_repeated(call) for call in calls.values()], ROUNDS, time.perf_counter
            )
        ]
    else:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            seconds = interleave(list(calls.values()), ROUNDS)
        finally:
            torch.set_num_threads(threads)
    best = {name: min(times) * 1e3 for name, times in zip(calls, seconds)}

    path = "compiled" if patchreg_ops.build_info()[device] else "reference"
    goals = dict(zip(("compress", "decompress"), GOALS[device]))
    figures = []
    for name in calls:
        kind = name.split(",")[0]
        if kind == "copy":
            continue
        base = best.get(f"copy, {kind}")
        figures.append(
            figure(
                f"{name} ({path})" if name in goals else name,
                best[name],
                "ms",
                baseline=base,
                ratio=None if base is None else best[name] / base,
                goal=goals.get(name),
            )
        )
    return figures


def _repeated(call: Callable[[], Any]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(20):
            call()
        torch.cuda.synchronize()

    return calls
