"""Benchmarks: every module here is a name of `tools/benchmark.py` and has `run(device) -> list[dict]`.

A module whose name starts with an underscore is a part of others.

A figure is a ratio of two things measured in one run, interleaved, with pinned threads; CPU time where wall
clock is noisy.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Sequence
from typing import Any

from patchreg.utils.errors import ConfigError, did_you_mean


def names() -> list[str]:
    """Return the names of all benchmarks."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if not name.startswith("_"))


def run(name: str, device: str) -> list[dict[str, Any]]:
    """Run one benchmark.

    Args:
        name: Its name.
        device: `cpu` or `cuda`.

    Returns:
        One dict per figure: metric, value, unit, baseline, ratio, goal, ok (None where there is no goal).

    Raises:
        ConfigError: There is no benchmark of that name.
    """
    if name not in names():
        raise ConfigError(
            f"no benchmark is called '{name}'.{did_you_mean(name, names())} Known: {', '.join(names())}"
        )
    return importlib.import_module(f"{__name__}.{name}").run(device)


def figure(
    metric: str,
    value: float,
    unit: str,
    baseline: float | None = None,
    ratio: float | None = None,
    goal: float | None = None,
    at_most: bool = True,
) -> dict[str, Any]:
    """Describe one figure.

    Args:
        metric: What was measured.
        value: The figure.
        unit: Its unit.
        baseline: What it is compared with, in the same unit.
        ratio: value / baseline, from interleaved pairs.
        goal: Bound on the ratio, or None.
        at_most: Whether the bound is an upper one.
    """
    ok = None
    if goal is not None and ratio is not None:
        ok = ratio <= goal if at_most else ratio >= goal
    return dict(
        metric=metric, value=value, unit=unit, baseline=baseline, ratio=ratio, goal=goal, ok=ok
    )


def interleave(
    calls: Sequence[Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.process_time
) -> list[list[float]]:
    """Time several calls in turn and return the seconds of every round for each.

    Args:
        calls: What to time.
        rounds: Rounds; in each, every call runs once, after one uncounted round.
        clock: Clock in seconds; the CPU time of the process by default.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for index, call in enumerate(calls):
            start = clock()
            call()
            if number:
                seconds[index].append(clock() - start)
    return seconds
