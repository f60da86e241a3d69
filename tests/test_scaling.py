"""Counting what processes exchange, what follows from it, and the commands of docs/scaling.md."""

from __future__ import annotations

import dataclasses
import re
import shlex
from argparse import ArgumentParser
from types import SimpleNamespace

import ddp_parts
import pytest
from mmengine.config import DictAction
from torch import nn

from patchreg.benchmarks import communication
from patchreg.benchmarks.communication import TRAININGS, Cluster, Measured
from patchreg.runner.build import EngineRunner, load_config
from patchreg.utils.errors import ConfigError

PAGE = ddp_parts.ROOT / "docs/scaling.md"
ONE = Measured(
    gradients=400e6,
    reduced=0.0,
    gathered=0.0,
    collectives=0.0,
    operations=10e9,
    loaded=1.0,
    seconds=1e-3,
)
QUIET = Cluster(peak=100e12, overlap=0.5, inside=100e9, between=10e9, latency=0.0, jitter=0.0)
EVEN = dataclasses.replace(TRAININGS[0], batch=100, share=0.1)
"""A step of 0.1 s, half of it a backward pass that hides gradients."""


@pytest.mark.parametrize(
    ("change", "world", "waits"),
    [
        ({}, 8, 0.0),  # 0.7 GB within the node in 7 ms, hidden
        ({}, 64, 2 * 63 / 64 * 0.04 - 0.05),
        ({"reduced": 1e8}, 8, 2 * 7 / 8 * 1e-3),
        ({"gathered": 2e4}, 8, 7 * 100 * 2e4 / 1e11),
        ({"gathered": 2e4, "gradients": 0.0}, 64, 63 * 100 * 2e4 / 1e10),
    ],
)
def test_efficiency_is_what_the_assumptions_say(change: dict, world: int, waits: float) -> None:
    found = communication.efficiency(dataclasses.replace(ONE, **change), EVEN, world, QUIET)
    assert found == pytest.approx(0.1 / (0.1 + waits), rel=1e-12)


def test_latency_and_slowest_gpu_count() -> None:
    found = dataclasses.replace(ONE, gradients=0.0, collectives=10)
    cluster = dataclasses.replace(QUIET, latency=1e-4)
    assert communication.efficiency(found, EVEN, 64, cluster) == pytest.approx(0.1 / 0.106)
    cluster = dataclasses.replace(QUIET, jitter=0.01)
    # sqrt(2 ln 64) = 2.884
    assert communication.efficiency(found, EVEN, 64, cluster) == pytest.approx(0.9720, abs=1e-4)
    assert communication.cores_per_gpu(ONE, EVEN, QUIET) == pytest.approx(1.0)


@pytest.mark.ddp
def test_two_processes_exchange_what_the_model_has() -> None:
    """0.67 M parameters of four bytes, and nothing else; images of three times 224 x 224 bytes."""
    (found,) = communication.measure(["AnchorNet, localiser"]).values()
    assert found.gradients == 4 * 674_696
    assert found.reduced == found.gathered == 0
    assert found.loaded == 3 * 224 * 224
    # Three times the 60.5 M multiply-accumulates of a forward pass; the first layer needs one part less.
    assert 2 * 2.5 * 60.5e6 < found.operations <= 6 * 60.5e6
    assert found.seconds > 0


def test_what_follows_no_line_is_refused() -> None:
    row = dict(dataclasses.asdict(ONE), images=2)
    assert communication.line([row, {**row, "images": 4}]) == ONE
    other = {**row, "images": 4, "gathered": 5.0}
    with pytest.raises(ValueError, match="not a line"):
        communication.line([row, other])


COMMANDS = re.findall(r"^    (?:tools/dist_train\.sh) (.*)$", PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_name_options_that_exist(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ddp_parts.ROOT)
    parser = ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("processes", type=int)
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={})
    found = parser.parse_args(shlex.split(command))
    # Weights of stages before this one, which need not be there.
    to_come = {"work_dirs": "work_dirs"}
    config = load_config(found.config, found.cfg_options, moved=to_come)
    assert found.cfg_options
    for key, value in found.cfg_options.items():
        node = config
        for part in key.split("."):
            node = node[int(part)] if part.isdigit() else node[part]
        assert node == value, key


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize(("value", "words"), [("torch", "GPUs only"), ("mmcv", "use 'torch'")])
def test_synchronised_batch_norm_needs_gpus(
    value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchreg.runner.build.get_device", lambda: "cpu")
    runner = SimpleNamespace(distributed=True, cfg={"sync_bn": value})
    with pytest.raises(ConfigError, match=words):
        EngineRunner.wrap_model(runner, None, nn.BatchNorm1d(3))
