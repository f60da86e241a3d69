"""Weighted k-NN: one pass for all k beside a loop in the style of DINO's, and beside faiss."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from patchreg.benchmarks import figure, interleave
from patchreg.metrics.knn import class_ranks, knn_votes, nearest_neighbours

QUERIES, BANK, WIDTH, CLASSES = 512, 131072, 384, 1000
KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
ROUNDS = 5


def loop_per_k(queries: Tensor, bank: Tensor, labels: Tensor, k: int) -> Tensor:
    """Classify as DINO's script does for one k: whole score matrix, one-hot labels, full sort.

    Written anew after its description.

    Args:
        queries: Unit features to classify.
        bank: Unit features to search in.
        labels: Classes of the bank.
        k: Neighbours.

    Shape:
        queries [Q, D]; bank [N, D]; labels [N]; returns classes by falling votes [Q, K].
    """
    similarity, index = (queries @ bank.T).topk(k, dim=1)
    one_hot = torch.zeros(len(queries) * k, CLASSES, device=bank.device)
    one_hot.scatter_(1, labels[index].view(-1, 1), 1)
    weights = similarity.div(TEMPERATURE).exp()
    votes = (one_hot.view(len(queries), k, CLASSES) * weights[:, :, None]).sum(dim=1)
    return votes.sort(dim=1, descending=True).indices


@torch.inference_mode()
def run(device: str) -> list[dict[str, Any]]:
    """Classify 512 queries by a bank of 131,072 features of width 384, for four values of k.

    Args:
        device: `cpu` (process CPU time, one thread) or `cuda` (wall clock).

    Returns:
        Figures of `patchreg.benchmarks`; the ratio of a speed is how many times faster.
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(CLASSES, (count,), generator=generator)
        features = 2 * torch.randn(count, WIDTH, generator=generator) + centres[labels]
        return F.normalize(features, dim=1).to(device), labels.to(device)

    (bank, labels), (queries, targets) = draw(BANK), draw(QUERIES)

    def one_pass(dtype: torch.dtype) -> list[float]:
        similarity, index = nearest_neighbours(queries, bank, max(KS), dtype)
        votes = knn_votes(similarity, labels[index], KS, CLASSES, TEMPERATURE)
        return [100 * (class_ranks(v, targets) == 0).double().mean().item() for v in votes]

    def loop() -> list[float]:
        first = [loop_per_k(queries, bank, labels, k)[:, 0] for k in KS]
        return [100 * (item == targets).double().mean().item() for item in first]

    calls: dict[str, Callable[[], Any]] = {
        "loop per k": loop,
        "one pass, float32": lambda: one_pass(torch.float32),
        "one pass, bfloat16": lambda: one_pass(torch.bfloat16),
    }
    if device == "cpu" and (search := _faiss_searches(queries, bank)) is not None:
        calls["faiss Flat, four searches"] = search
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        clock = time.process_time if device == "cpu" else time.perf_counter
        seconds = interleave(list(calls.values()), ROUNDS, clock)
        accuracy = {name: call() for name, call in calls.items() if not name.startswith("faiss")}
    finally:
        torch.set_num_threads(threads)
    best = {name: min(times) for name, times in zip(calls, seconds, strict=True)}
    goals = {"one pass, float32": 4.5, "one pass, bfloat16": 9.0} if device == "cpu" else {}
    figures = []
    for name in list(calls)[1:3]:
        speed = best["loop per k"] / best[name]
        goal = goals.get(name, 10.0 if name.endswith("float32") else None)
        figures.append(
            figure(
                f"{name}, times faster than the loop",
                best[name],
                "s",
                baseline=best["loop per k"],
                ratio=speed,
                goal=goal,
                at_most=False,
            )
        )
        worst = max(abs(a - b) for a, b in zip(accuracy[name], accuracy["loop per k"], strict=True))
        figures.append(figure(f"{name}, top-1 differs by at most", worst, "points"))
    for name in calls:
        if name.startswith("faiss"):
            mine = best["one pass, float32"]
            figures.append(
                figure(
                    f"one pass, float32, beside {name}",
                    mine,
                    "s",
                    baseline=best[name],
                    ratio=mine / best[name],
                    goal=1.2,
                )
            )
    return figures


def _faiss_searches(queries: Tensor, bank: Tensor) -> Callable[[], Any] | None:
    """Return the searches of faiss's flat index for every k, or None where it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(WIDTH)
    index.add(bank.numpy())
    return lambda: [index.search(queries.numpy(), k) for k in KS]
