"""Soft rank in pure PyTorch against torchsort's C++ on a CPU; alone on a GPU.

Letters: B rows, n scores of a row.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patchreg.benchmarks import figure, interleave
from patchreg.models.selectors.soft_rank import soft_rank, torchsort_kernels
from patchreg.utils.errors import ConfigError

ROWS = 128
SIZES = (49, 144, 196)
SPREADS = (1.0, 30.0)
ROUNDS = 30
RATIO, ERROR, GRADIENT_ERROR = 2.0, 1e-4, 1e-5


def _step(rank: Callable[[Tensor], Tensor], scores: Tensor, grad: Tensor) -> Callable[[], None]:
    def call() -> None:
        scores.grad = None
        rank(scores).backward(grad)

    return call


def _cuda(rank: Callable[[Tensor], Tensor], scores: Tensor, grad: Tensor) -> float:
    """Seconds of one forward and backward between two events, after a warm-up."""
    call = _step(rank, scores, grad)
    for _ in range(10):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(ROUNDS):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / ROUNDS


def _error(name: str, error: float, bound: float) -> dict[str, Any]:
    return figure(name, 1e6 * error, "1e-6", 1e6 * bound, error / bound, 1.0)


def run(device: str) -> list[dict[str, Any]]:
    """Measure time and error of forward and backward for rows of 49, 144 and 196 scores.

    Scores of spread 1 pool nearly all at once, scores of spread 30 need many rounds.

    Args:
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: torchsort, the baseline on a CPU, is not installed.
    """
    if device == "cpu" and torchsort_kernels("cpu") is None:
        raise ConfigError(
            "the baseline torchsort is not installed: pip install --no-build-isolation torchsort"
        )
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for count in SIZES:
        for spread in SPREADS:
            drawn = torch.randn(ROWS, count, generator=generator) * spread
            grad = torch.randn(ROWS, count, generator=generator).to(device)
            scores = drawn.to(device).requires_grad_()
            name = f"soft rank, {ROWS} x {count} scores of spread {spread:g}"

            def ours(values: Tensor) -> Tensor:
                return soft_rank(values, backend="torch")

            if device == "cuda":
                rows.append(figure(name, 1e3 * _cuda(ours, scores, grad), "ms"))
                continue
            import torchsort

            theirs = torchsort.soft_rank
            found, other = interleave(
                [_step(ours, scores, grad), _step(theirs, scores, grad)], ROUNDS
            )
            ratio = statistics.median(a / b for a, b in zip(found, other, strict=True))
            times = [1e3 * statistics.median(part) for part in (found, other)]
            rows.append(figure(f"{name} (CPU time)", times[0], "ms", times[1], ratio, RATIO))
            if spread == SPREADS[0]:
                exact = theirs(scores.double())
                error = float((ours(scores).double() - exact).detach().abs().max())
                rows.append(_error(f"{name}: error", error, ERROR))
                gradients = [
                    torch.autograd.grad(rank(scores), scores, grad)[0] for rank in (ours, theirs)
                ]
                error = float((gradients[0] - gradients[1]).abs().max())
                rows.append(_error(f"{name}: error of the gradient", error, GRADIENT_ERROR))
    return rows
