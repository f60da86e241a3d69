"""Wishes to stop are exchanged about ten times a second, from the first iterations on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from patchreg.runner import stop
from patchreg.runner.stop import StopSignals, TrainingStopped

RUNNER = SimpleNamespace(
    iter=0, epoch=0, hooks=[], logger=SimpleNamespace(warning=lambda text: None)
)


class Clock:
    """A clock that a test sets, and the times of all exchanges."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.exchanges: list[float] = []
        monkeypatch.setattr(stop.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(dist, "all_reduce", self.exchange)
        monkeypatch.setattr(dist, "barrier", lambda **_: None)

    def exchange(self, *_: object, **__: object) -> SimpleNamespace:
        self.exchanges.append(self.now)
        return SimpleNamespace(wait=lambda: None)


def train(signals: StopSignals, clock: Clock, steps: int, seconds: float) -> None:
    """The first wish is read before the first iteration, at once after the construction."""
    signals._group = object()
    for _ in range(steps):
        signals.obey(RUNNER)
        clock.now += seconds


@pytest.mark.parametrize("seconds", [0.5, 0.02, 0.001])
def test_an_early_wish_is_granted_after_two_iterations(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    clock, signals = Clock(monkeypatch), StopSignals()
    signals.number = 15
    with pytest.raises(TrainingStopped):
        train(signals, clock, 1000, seconds)
    assert clock.now == pytest.approx(2 * seconds)


@pytest.mark.parametrize(("seconds", "pause"), [(0.5, 0.5), (0.02, 0.1), (0.001, 0.1)])
def test_exchanges_are_a_tenth_of_a_second_apart_or_an_iteration(
    monkeypatch: pytest.MonkeyPatch, seconds: float, pause: float
) -> None:
    clock, signals = Clock(monkeypatch), StopSignals()
    train(signals, clock, 500, seconds)
    gaps = [b - a for a, b in zip(clock.exchanges[1:], clock.exchanges[2:], strict=False)]
    assert gaps
    assert gaps == pytest.approx([pause] * len(gaps), abs=seconds * 1.01)
    assert max(gaps) <= pause + 1e-9
