"""Kills at random moments, until the run is through; minutes, so run by hand: pytest -m slow tests/soak."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import launches
import pytest
from test_resume import same_run


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_five_kills_at_random_moments_change_nothing(tmp_path: Path, seed: int) -> None:
    draws = random.Random(seed)
    config = launches.quick_config(tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launches.finish(launches.start(config, whole)) == 0
    steps = sorted(draws.sample(range(2, 40), 5))
    for step in steps:
        run = launches.start(config, parts, "--resume")
        code = launches.signal_after(run, parts, step, signal.SIGKILL, draws.uniform(0.0, 0.1))
        assert code == -signal.SIGKILL
    assert launches.finish(launches.start(config, parts, "--resume")) == 0
    same_run(parts, whole)
    print(
        f"\nseed {seed}: killed after steps {steps}; {len(launches.rows(parts))} rows logged, 44 steps"
    )
