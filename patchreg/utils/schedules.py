"""Schedules as closed formulas of the step: no state, so nothing to get wrong on resume."""

from __future__ import annotations

import math

from patchreg.utils.errors import ConfigError


def warmup_cosine(
    step: int, steps: int, base: float, final: float, warmup: int = 0, start: float = 0.0
) -> float:
    """Return the value of a step: linear from `start` to `base`, then half a cosine towards `final`.

    Both ends of the linear part are taken, so `base` comes twice in a row; `final` is approached and
    never reached.

    Source:
        `cosine_scheduler` of the official DINO.

    Args:
        step: Step from 0; beyond the last one the value stays.
        steps: Number of steps, warm-up included.
        base: Value at the end of the warm-up.
        final: Value that the cosine goes to.
        warmup: Steps of warm-up.
        start: Value of the first step of the warm-up.

    Raises:
        ConfigError: The warm-up is longer than the whole.
    """
    if not 0 <= warmup <= steps or steps < 1:
        raise ConfigError(
            f"a warm-up of {warmup} steps does not fit into {steps} steps; shorten it or train longer"
        )
    step = min(step, steps - 1)
    if step < warmup:
        return start + (base - start) * step / max(warmup - 1, 1)
    return final + 0.5 * (base - final) * (
        1 + math.cos(math.pi * (step - warmup) / (steps - warmup))
    )


def linear_warmup(step: int, start: float, final: float, warmup: int) -> float:
    """Return the value of a step: linear from `start` to `final`, both taken, then constant.

    Args:
        step: Step from 0.
        start: Value of the first step.
        final: Value of step `warmup - 1` and of all later ones.
        warmup: Steps of the linear part; 0 for none.
    """
    if step >= warmup:
        return final
    return start + (final - start) * step / max(warmup - 1, 1)
