"""Two processes, or gradients accumulated over two batches, compute what one process does with one batch."""

from __future__ import annotations

import re
from pathlib import Path

import ddp_parts
import launches
import pytest
import torch

from patchreg.runner.build import latest_checkpoint
from patchreg.utils.weights import load_file

pytestmark = pytest.mark.ddp

DOUBLE = {"model.type": "DoubleDGEClassifier"}
SAMPLE = {"model.backbone.drop_path_mode": "sample"}
# A batch cannot be mixed with one that is not loaded yet, nor the square of its mean cost be known.
NO_PARTNER = {"model.budget_loss.loss_weight": 0.0, "data_preprocessor.batch_augment": None}
HALVES = {"optim_wrapper.accumulative_counts": 2}
FORMS = {
    "query": ({**DOUBLE}, {}),
    "sample": ({**DOUBLE, **SAMPLE}, {}),
    "float32": ({}, {}),
    "accumulated": ({**DOUBLE, **NO_PARTNER}, HALVES),
}


def jobs(config: Path, folder: Path, processes: int) -> list[dict]:
    """The runs of one launch; the global batch is 16 in all of them."""
    found = []
    for name, (options, parts) in FORMS.items():
        batch = 16 // processes // (2 if parts and processes > 1 else 1)
        options = {**options, "train_dataloader.batch_size": batch}
        if processes > 1:
            options.update(parts)
        found.append(dict(work_dir=str(folder / name), options=options))
    if processes == 1:
        options = {**FORMS["accumulated"][0], **HALVES, "train_dataloader.batch_size": 8}
        found.append(dict(work_dir=str(folder / "alone accumulated"), options=options))
    else:
        stop = {"custom_hooks.0.terminate": 1, "custom_hooks.0.at": 7}
        options = {**FORMS["query"][0], "train_dataloader.batch_size": 8}
        again = dict(work_dir=str(folder / "stopped"), options=options, resume="auto")
        found += [{**again, "options": {**options, **stop}}, again]
    for job in found:
        job["path"] = str(config)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the runs `one/NAME` and `two/NAME`, and the exit codes of the latter."""
    folder = tmp_path_factory.mktemp("ddp")
    config = folder / "quick.py"
    config.write_text(ddp_parts.CONFIG.format(root=ddp_parts.ROOT))
    codes = ddp_parts.run_two(
        folder,
        jobs(config, folder / "two", 2),
        lambda: ddp_parts.run(jobs(config, folder / "one", 1)),
    )
    assert codes == [0, 0, 0, 0, 143, 0]
    return folder


def difference(found: Path, expected: Path) -> float:
    """Largest difference of the final weights."""
    ours, theirs = (load_file(latest_checkpoint(path))["state_dict"] for path in (found, expected))
    assert ours.keys() == theirs.keys()
    assert {value.dtype for value in ours.values()} == {torch.float64, torch.int64}
    return max(float((ours[key] - theirs[key]).abs().max()) for key in ours)


@pytest.mark.parametrize("name", ["query", "sample"])
def test_two_processes_compute_what_one_does(runs: Path, name: str) -> None:
    one, two = runs / "one" / name, runs / "two" / name
    found, expected = ddp_parts.losses(two), ddp_parts.losses(one)
    assert len(expected) == 20
    assert (found - expected).abs().max() < 1e-8
    assert difference(two, one) < 1e-8


def test_two_processes_compute_the_same_losses_in_float32(runs: Path) -> None:
    found, expected = (ddp_parts.losses(runs / form / "float32") for form in ("two", "one"))
    assert len(expected) == 20
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("form", ["two/accumulated", "one/alone accumulated"])
def test_accumulated_batches_compute_what_one_large_batch_does(runs: Path, form: str) -> None:
    found, expected = ddp_parts.losses(runs / form), ddp_parts.losses(runs / "one/accumulated")
    assert len(found) == 40
    assert (found.view(20, 2).mean(1) - expected).abs().max() < 1e-8
    assert difference(runs / form, runs / "one/accumulated") < 1e-8


@pytest.mark.parametrize("name", ["query", "sample"])
def test_validation_drops_the_padding(runs: Path, name: str) -> None:
    one, two = (launches.scalars(runs / form / name) for form in ("one", "two"))
    for step in (1, 2):
        expected, found = one["val", step], two["val", step]
        assert {"accuracy/top1", "cost/ratio", "granularity/s1"} <= expected.keys()
        assert found == pytest.approx(expected, abs=1e-9)
        right = found["accuracy/top1"] / 100 * 51
        assert right == pytest.approx(round(right), abs=1e-4)


def test_a_signal_to_one_process_stops_all_at_the_same_iteration(runs: Path) -> None:
    said = (runs / "0.out").read_text()
    (iteration,) = re.findall(r"stopped by SIGTERM after iteration (\d+) ", said)
    assert 8 <= int(iteration) <= 12
    assert (runs / f"two/stopped/iter_{iteration}.pth").is_file()
    assert difference(runs / "two/stopped", runs / "two/query") == 0.0
