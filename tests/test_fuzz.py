"""Broken inputs end in a message or are taken as they are: no other error, no hang, no code, no stray file."""

from __future__ import annotations

import random
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import fuzz_inputs
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

LIMIT = 10.0
"""Seconds of CPU time that any input may take; wall-clock time depends on what else runs."""


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def attempt(kind: str, seed: int, folder: Path) -> str:
    """Give one drawn input to the project and check what is left behind."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        before = files_below(folder)
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = fuzz_inputs.KINDS[kind](random.Random(seed), place)
        assert time.process_time() - start < LIMIT
        assert not (place / fuzz_inputs.SENTINEL).exists(), "a checkpoint ran code"
        assert not (place / "run").exists(), "a dry run wrote"
        outside = {path for path in files_below(folder) - before if place not in path.parents}
        assert outside == set()
    return found


@pytest.mark.parametrize("kind", fuzz_inputs.KINDS)
def test_some_broken_inputs_of_each_kind(kind: str, tmp_path: Path) -> None:
    run(kind, tmp_path, 20)


@pytest.mark.slow
def test_two_thousand_broken_inputs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shares = {
        "config": 500,
        "config text": 100,
        "CSV table": 350,
        "image": 450,
        "checkpoint": 450,
        "labels": 150,
    }
    assert sum(shares.values()) == 2000
    rows = [
        f"| {'kind':12s} | inputs | accepted | refused in words | slowest |",
        "|---|---|---|---|---|",
    ]
    for kind, count in shares.items():
        found, slowest = run(kind, tmp_path, count)
        rows.append(
            f"| {kind:12s} | {count} | {found['accepted']} | {found['refused']} | {slowest:.2f} s |"
        )
    with capsys.disabled():
        print("", *rows, sep="\n")


def run(kind: str, folder: Path, count: int) -> tuple[Counter, float]:
    """Try a number of inputs of one kind."""
    found: Counter = Counter()
    times = [0.0]

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**63 - 1))
    def one(seed: int) -> None:
        start = time.process_time()
        found[attempt(kind, seed, folder)] += 1
        times.append(time.process_time() - start)

    one()
    return found, max(times)
