"""From a compute budget to exit thresholds, and calibration of confidences.

Letters: N images, M stages, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchreg.methods.anchornet.table import ConfidenceTable, Outcome
from patchreg.utils.errors import ConfigError, DataError

_SWEEPS = 30
_HALVINGS = 40


@dataclass(frozen=True)
class Solution:
    """Thresholds for a budget, and what they give where they were found and elsewhere.

    Args:
        budget: Wanted mean cost of an image.
        fitted: Outcome on the half on which the thresholds were chosen.
        held_out: Outcome on the other half.
    """

    budget: float
    fitted: Outcome
    held_out: Outcome


class _Search:
    """Best thresholds for one price of cost, by exact line searches over one threshold at a time."""

    def __init__(self, table: ConfidenceTable) -> None:
        self.confidence = table.confidence.cpu().float().numpy()
        self.correct = table.correct.cpu().double().numpy()
        rows, self.stages = self.confidence.shape
        cost = np.broadcast_to(np.asarray(table.costs), (rows, self.stages)).copy()
        if table.views is not None:
            last = table.views.cpu().numpy() - 1
            for stage in range(self.stages):
                cost[:, stage] = np.asarray(table.costs)[np.minimum(stage, last)]
        self.cost = cost
        self.order = [np.argsort(-column, kind="stable") for column in self.confidence.T]

    def leaving(self, limits: np.ndarray) -> np.ndarray:
        """Stage at which each image leaves."""
        sure = self.confidence[:, :-1] > limits
        return np.where(sure.any(1), sure.argmax(1), self.stages - 1)

    def mean_cost(self, limits: np.ndarray) -> float:
        """Mean cost of an image."""
        return float(np.take_along_axis(self.cost, self.leaving(limits)[:, None], 1).mean())

    def best(self, price: float, start: np.ndarray) -> tuple[np.ndarray, float]:
        """Climb from some thresholds to a local optimum of accuracy minus price times cost."""
        value = self.correct - price * self.cost
        limits = start.copy()
        score = -np.inf
        for _ in range(_SWEEPS):
            for stage in range(self.stages - 2, -1, -1):
                limits[stage] = self._line(value, limits, stage)
            now = float(np.take_along_axis(value, self.leaving(limits)[:, None], 1).mean())
            if now <= score + 1e-12:
                break
            score = now
        return limits, score

    def _line(self, value: np.ndarray, limits: np.ndarray, stage: int) -> np.float32:
        """Best threshold of one stage, the others fixed: where the summed gain of leaving peaks."""
        beyond = limits.copy()
        beyond[stage] = np.inf
        stay = np.take_along_axis(value, self.leaving(beyond)[:, None], 1)[:, 0]
        reached = np.logical_not((self.confidence[:, :stage] > limits[:stage]).any(1))
        order = self.order[stage]
        order = order[reached[order]]
        if len(order) == 0:
            return limits[stage]
        scores = self.confidence[order, stage]
        gain = np.concatenate(([0.0], np.cumsum((value[:, stage] - stay)[order])))
        # A threshold can only lie between different confidences.
        allowed = np.concatenate(([True], scores[1:] < scores[:-1], [True]))
        place = int(np.where(allowed, gain, -np.inf).argmax())
        if place == len(order):
            return np.float32(0.0)
        # Halfway, so that rounding elsewhere does not turn a decision.
        above = scores[place - 1] if place else np.float32(1.0)
        return np.float32((above + scores[place]) / 2)


def solve_thresholds(table: ConfidenceTable, budget: float) -> tuple[float, ...]:
    """Find exit thresholds with the best accuracy at a mean cost of at most a budget.

    Accuracy minus price times cost is climbed one threshold at a time, each by an exact line search over
    all confidences; the price is bisected until the budget is met, and what is left of the budget
    is spent on the way to the next dearer solution.

    Source:
        Own; the published thresholds were picked by hand.

    Args:
        table: Table to fit on; its costs give the unit of the budget (multiply-accumulates,
            milliseconds).
        budget: Wanted mean cost of an image.

    Returns:
        One threshold per stage, the last one 0.

    Raises:
        ConfigError: The budget is below the cost of the first stage.
    """
    if not budget >= table.costs[0]:
        raise ConfigError(
            f"budget={budget:g} cannot be met: the first stage alone costs {table.costs[0]:g}, all stages "
            f"{table.costs[-1]:g}; choose a budget from {table.costs[0]:g} on"
        )
    search = _Search(table)
    if table.stages == 1:
        return (0.0,)
    grid = np.linspace(0.3, 0.95, 3, dtype=np.float32)
    starts = [np.full(table.stages - 1, value, dtype=np.float32) for value in grid]
    cheap = np.zeros(table.stages - 1, dtype=np.float32)
    dear, _ = max((search.best(0.0, start) for start in starts), key=lambda found: found[1])
    if search.mean_cost(dear) <= budget:
        return _as_thresholds(dear)
    span = table.costs[-1] - table.costs[0]
    low, high = 0.0, 10.0 / max(span, 1e-12)
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        found = [search.best(price, start) for start in (starts[1], cheap, dear)]
        limits, _ = max(found, key=lambda one: one[1])
        cost = search.mean_cost(limits)
        if cost <= budget:
            cheap, high = limits, price
        else:
            dear, low = limits, price
        if high - low < 1e-3 * high or abs(cost - budget) < 1e-3 * budget:
            break
    return _as_thresholds(_between(search, cheap, dear, budget))


def _between(search: _Search, cheap: np.ndarray, dear: np.ndarray, budget: float) -> np.ndarray:
    """Walk from cheap to dear thresholds as far as the budget goes."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        mixed = ((1 - middle) * cheap + middle * dear).astype(np.float32)
        if search.mean_cost(mixed) <= budget:
            low = middle
        else:
            high = middle
    return ((1 - low) * cheap + low * dear).astype(np.float32)


def _as_thresholds(limits: np.ndarray) -> tuple[float, ...]:
    return (*(float(limit) for limit in np.clip(limits, 0, 1)), 0.0)


def solve_and_report(table: ConfidenceTable, budget: float, seed: int = 0) -> Solution:
    """Fit thresholds on one half of a table and report them on the other.

    Args:
        table: The whole table.
        budget: Wanted mean cost of an image.
        seed: Seed of the split.
    """
    fit, test = table.halves(seed)
    thresholds = solve_thresholds(fit, budget)
    return Solution(budget, fit.evaluate(thresholds), test.evaluate(thresholds))


def fit_temperatures(table: ConfidenceTable) -> tuple[float, ...]:
    """Find for each stage the temperature under which its confidences are most likely.

    Summed logits make confidences too high from stage to stage; a temperature per stage mends that and
    leaves every prediction as it is.

    Source:
        Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2.

    Args:
        table: Table with logits and labels.

    Raises:
        DataError: The table has no logits or labels.
    """
    logits, labels = _with_logits(table)
    found = []
    for stage in range(table.stages):
        z = logits[:, stage].double()
        # The likelihood has one peak in 1 / temperature.
        low, high = 1e-2, 1e2
        for _ in range(60):
            first, second = low * (high / low) ** (1 / 3), low * (high / low) ** (2 / 3)
            if _nll(z / first, labels) < _nll(z / second, labels):
                high = second
            else:
                low = first
        found.append((low * high) ** 0.5)
    return tuple(found)


def _nll(logits: Tensor, labels: Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits, labels).item()


def calibrate(table: ConfidenceTable, temperatures: Sequence[float]) -> ConfidenceTable:
    """Return a table whose confidences come from logits divided by a temperature per stage.

    Args:
        table: Table with logits.
        temperatures: One per stage, above 0.

    Raises:
        DataError: The table has no logits.
        ConfigError: The temperatures do not fit.
    """
    logits, _ = _with_logits(table)
    if len(temperatures) != table.stages or min(temperatures) <= 0:
        raise ConfigError(
            f"temperatures={list(temperatures)}: expected {table.stages} numbers above 0"
        )
    scale = torch.tensor(list(temperatures), dtype=logits.dtype)[:, None]
    confidence = (logits / scale).float().softmax(2).amax(2)
    return dataclasses.replace(table, confidence=confidence)


def calibration_error(table: ConfidenceTable, bins: int = 15) -> list[float]:
    """Return the expected calibration error of each stage.

    Source:
        Guo et al. 2017, equation 3.

    Args:
        table: The table.
        bins: Bins of equal width.
    """
    errors = []
    for stage in range(table.stages):
        confidence, correct = table.confidence[:, stage].double(), table.correct[:, stage].double()
        place = (confidence * bins).long().clamp(max=bins - 1)
        sure = torch.bincount(place, confidence, minlength=bins)
        right = torch.bincount(place, correct, minlength=bins)
        errors.append((sure - right).abs().sum().item() / len(table))
    return errors


def _with_logits(table: ConfidenceTable) -> tuple[Tensor, Tensor]:
    if table.logits is None or table.labels is None:
        raise DataError(
            "calibration needs a table with logits and labels; make it with keep_logits=True (the authors' "
            "format holds neither)"
        )
    return table.logits, table.labels
