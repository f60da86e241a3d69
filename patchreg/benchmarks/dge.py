"""Sparse execution of DGE: how much of the saved computation is saved time.

DeiT-S at 256 px. Efficiency = (time of the dense twin / time of DGE) x (MACs executed by DGE / MACs
of the dense twin); 1 means that saved MACs are saved time.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from patchreg.benchmarks import figure, interleave
from patchreg.methods.dge.graph import DGEGraphRunner
from patchreg.models.token_merging import merged_features, merged_macs, merges_for
from patchreg.registry import MODELS

SIDE, GRID = 256, (16, 16)
REGIONS = 16
# (images, type, rounds, least efficiency)
CASES = {
    "cpu": ((8, torch.float32, 15, 0.95), (1, torch.float32, 60, 0.88)),
    "cuda": ((256, torch.bfloat16, 15, 0.75),),
}
GRAPH = (32, torch.bfloat16, 60, 1.2)  # the last: least speed-up over the dense twin
TRAIN = {"cpu": (4, torch.float32, 5, 0.60), "cuda": (256, torch.bfloat16, 9, 0.60)}
TOME_GOAL = 0.93


class SeededRouter(nn.Module):
    """Router that works as ever, and whose choice is then overruled by a fixed one.

    Args:
        router: The router.
        choice: Candidate of every region.

    Shape:
        choice [B, Hr, Wr].
    """

    def __init__(self, router: nn.Module, choice: Tensor) -> None:
        super().__init__()
        self.router = router
        self.register_buffer("bonus", 1e4 * nn.functional.one_hot(choice, 3).float(), False)

    def forward(self, means: Tensor) -> Tensor:
        """Score the candidates.

        Args:
            means: Mean token of every region.
        """
        return self.router(means) + self.bonus


def seed_gates(backbone: Any, batch: int) -> None:
    """Fix the choice of every region: 125 queries on the mean.

    Images lie evenly between 26 and 221 queries (one image has 125), and the blocks of an image
    evenly up to 45 around that, in random order.

    Args:
        backbone: A `DGEVisionTransformerBackbone` with regions of 4 x 4 tokens.
        batch: Images.
    """
    generator = torch.Generator().manual_seed(0)
    routed = backbone.depth - backbone.skip_last_queries
    image = 6.6 + 13 * ((torch.arange(batch) + 0.5) / batch - 0.5)
    around = 6 * ((torch.arange(routed) + 0.5) / routed - 0.5)
    order = torch.rand(routed, batch, generator=generator).argsort(0)
    # Of 16 regions, `fine` are queried by 16 queries, three by 4 and the others by one.
    fine = (image + around[order]).round().clamp(0, 13).unsqueeze(-1)
    place = torch.rand(routed, batch, REGIONS, generator=generator).argsort(-1)
    choice = (place >= fine).long() + (place >= fine + 3).long()
    side = round(REGIONS**0.5)
    for block, chosen in zip(backbone.blocks, choice.view(routed, batch, side, side)):
        router = getattr(block.dge.router, "router", block.dge.router)
        block.dge.router = SeededRouter(router, chosen).to(router.gate.weight.device)


def build(kind: str, **kwargs: Any) -> Any:
    """Build a DeiT-S encoder with seeded weights.

    Args:
        kind: Registry name of the backbone.
        kwargs: Further arguments.
    """
    torch.manual_seed(0)
    return MODELS.build(dict(type=kind, arch="small", img_size=SIDE, **kwargs))


def keep_memory() -> None:
    """Let the C library keep freed memory, so that nobody's time holds page faults.

    By default it gives large blocks back and gets them anew, page by page; whom that hits depends
    on the order of the calls, and it cost the dense twin up to a tenth. Only glibc knows this.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 1 << 30)


def run(device: str) -> list[dict[str, Any]]:
    """Measure DGE, its dense twin and token merging in turn.

    Args:
        device: `cpu` (one thread, CPU time) or `cuda` (wall clock).

    Returns:
        Figures of `patchreg.benchmarks`, medians of all rounds, and those of `roofline`.
    """
    from patchreg.benchmarks import roofline  # It builds on this module.

    keep_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = []
        for case in CASES[device]:
            found += forward_figures(device, *case)
        if device == "cuda":
            found += graph_figures(*GRAPH)
        found += training_figures(device, *TRAIN[device])
        return found + roofline.run(device)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def forward_figures(
    device: str, batch: int, dtype: torch.dtype, rounds: int, goal: float
) -> list[dict[str, Any]]:
    """Measure evaluation, with the patch queries of DGE's last block skipped.

    Args:
        device: `cpu` or `cuda`.
        batch: Images.
        dtype: Type of weights and images.
        rounds: Rounds.
        goal: Least efficiency.
    """
    dense = build("VisionTransformerBackbone").to(device, dtype).eval()
    sparse = build("DGEVisionTransformerBackbone", skip_last_queries=True).to(device, dtype).eval()
    seed_gates(sparse, batch)
    images = torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    images = images.to(device, dtype)

    features = sparse(images)
    queries = torch.stack([block.queries for block in features.routing.routed]).mean()
    full = dense.macs(GRID)
    macs = float(features.macs.mean())
    merges = merges_for(dense, GRID, macs)
    merged = merged_macs(dense, GRID, merges)

    calls = [lambda: dense(images), lambda: sparse(images)]
    calls.append(lambda: merged_features(dense, images, merges))
    dense_times, own_times, tome_times = _times(calls, rounds, device)
    twin, own, other = map(statistics.median, (dense_times, own_times, tome_times))
    name = f"B={batch} {str(dtype).split('.')[1]}"
    share = _ratio(own_times, dense_times)
    efficiency = macs / full / share
    theirs = merged / full / _ratio(tome_times, dense_times)
    return [
        figure(f"{name}: forward, DGE against dense", 1e3 * own, "ms", 1e3 * twin, share),
        figure(f"{name}: mean queries of 257 tokens", float(queries), ""),
        figure(f"{name}: GMACs, DGE against dense", macs / 1e9, "G", full / 1e9, macs / full),
        figure(f"{name}: efficiency of DGE", efficiency, "", None, efficiency, goal, at_most=False),
        figure(f"{name}: GMACs, ToMe against DGE", merged / 1e9, "G", macs / 1e9, merged / macs),
        figure(f"{name}: efficiency of ToMe", theirs, "", None, theirs, TOME_GOAL, at_most=False),
        figure(
            f"{name}: forward, ToMe against DGE",
            1e3 * other,
            "ms",
            1e3 * own,
            _ratio(tome_times, own_times),
            1.0,
            at_most=False,
        ),
    ]


@torch.no_grad()
def graph_figures(batch: int, dtype: torch.dtype, rounds: int, goal: float) -> list[dict[str, Any]]:
    """Measure evaluation from captured graphs, of DGE and of its dense twin, on a GPU.

    Args:
        batch: Images.
        dtype: Type of weights and images.
        rounds: Rounds.
        goal: Least speed-up over the dense twin.
    """
    dense = build("VisionTransformerBackbone").to("cuda", dtype).eval()
    sparse = build("DGEVisionTransformerBackbone", skip_last_queries=True).to("cuda", dtype).eval()
    seed_gates(sparse, batch)
    images = torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    images = images.to("cuda", dtype)
    runner = DGEGraphRunner(sparse)
    runner(images)
    replay = _captured(lambda: dense(images).tokens)
    calls = [lambda: dense(images), replay, lambda: sparse(images), lambda: runner(images)]
    times = _times(calls, rounds, "cuda")
    own = 1e3 * statistics.median(times[3])
    name = f"B={batch} {str(dtype).split('.')[1]}, captured graph"
    found = []
    for text, other, bound in (
        ("eager dense twin", times[0], goal),
        ("captured dense twin", times[1], goal),
        ("eager DGE", times[2], None),
    ):
        speed = _ratio(other, times[3])
        base = 1e3 * statistics.median(other)
        metric = f"{name}: {text} against DGE"
        found.append(figure(metric, base, "ms", own, speed, bound, at_most=False))
    return found


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same work from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()

    def replay() -> Any:
        graph.replay()
        return held.clone()

    return replay


def training_figures(
    device: str, batch: int, dtype: torch.dtype, rounds: int, goal: float
) -> list[dict[str, Any]]:
    """Measure a training step on the chosen candidates against one on all of them.

    Args:
        device: `cpu` or `cuda`.
        batch: Images.
        dtype: Type of the computation; weights are float32.
        rounds: Rounds.
        goal: Bound on the ratio.
    """
    model = build("DGEVisionTransformerBackbone").to(device).train()
    seed_gates(model, batch)
    images = torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    images = images.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(sparse: bool) -> None:
        model.sparse_train = sparse
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            features = model(images)
        cost = features.routing.dynamic("corrected").mean() / features.dense_macs
        optimizer.zero_grad()
        (features.tokens[:, 0].float().square().mean() + cost).backward()
        optimizer.step()

    every_time, chosen_times = _times([lambda: step(False), lambda: step(True)], rounds, device)
    return [
        figure(
            f"B={batch} {str(dtype).split('.')[1]}: training step, chosen against all candidates",
            1e3 * statistics.median(chosen_times),
            "ms",
            1e3 * statistics.median(every_time),
            _ratio(chosen_times, every_time),
            goal,
        )
    ]


def _ratio(left: list[float], right: list[float]) -> float:
    """Median over the rounds of left / right: what disturbs a round disturbs both."""
    return statistics.median(a / b for a, b in zip(left, right, strict=True))


def _times(calls: list[Callable[[], Any]], rounds: int, device: str) -> list[list[float]]:
    """Seconds of each call in every round; on a GPU each ends with all work done."""
    if device == "cpu":
        return interleave(calls, rounds)

    def finished(call: Callable[[], Any]) -> Callable[[], None]:
        def run_and_wait() -> None:
            call()
            torch.cuda.synchronize()

        return run_and_wait

    return interleave([finished(call) for call in calls], rounds, time.perf_counter)
