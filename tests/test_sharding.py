"""Sharded, checkpointed and compiled training computes what plain training does."""

from __future__ import annotations

from pathlib import Path

import ddp_parts
import pytest
import torch

from patchreg.runner.build import latest_checkpoint
from patchreg.runner.run import train
from patchreg.runner.sharding import SHARDS_ON_CPUS
from patchreg.utils.errors import ConfigError
from patchreg.utils.weights import load_file

pytestmark = pytest.mark.ddp

needs_shards = pytest.mark.skipif(not SHARDS_ON_CPUS, reason="torch < 2.7 shards on GPUs only")

DOUBLE = {
    "model.type": "DoubleDGEClassifier",
    "optim_wrapper.clip_grad": {"max_norm": 0.5},
    "default_hooks.checkpoint.by_epoch": False,
    "default_hooks.checkpoint.interval": 7,
}
SHARDED = {"model_wrapper_cfg": {"type": "FullyShardedWrapper"}}
HALVES = {"optim_wrapper.accumulative_counts": 2}
SAVING = {"activation_checkpointing": ["backbone.blocks"]}


def jobs(config: Path, folder: Path) -> list[dict]:
    """The runs of two processes, in order; the last one continues in shards what was stopped in shards."""
    stop = {"custom_hooks.0.terminate": 1, "custom_hooks.0.at": 9}
    forms = {
        "plain": {},
        "sharded": SHARDED,
        "plain accumulated": HALVES,
        "sharded accumulated": {**SHARDED, **HALVES},
        "sharded and recomputed": {**SHARDED, **SAVING},
        "stopped": {**SHARDED, **stop},
    }
    if not SHARDS_ON_CPUS:
        forms = {name: options for name, options in forms.items() if name.startswith("plain")}
    found = []
    for name, options in forms.items():
        options = {**DOUBLE, **options, "train_dataloader.batch_size": 8}
        found.append(dict(work_dir=str(folder / name), options=options))
    again = {**DOUBLE, **SHARDED, "train_dataloader.batch_size": 8}
    if SHARDS_ON_CPUS:
        found.append(dict(work_dir=str(folder / "stopped"), options=again, resume="auto"))
    for job in found:
        job["path"] = str(config)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    config = folder / "quick.py"
    config.write_text(ddp_parts.CONFIG.format(root=ddp_parts.ROOT))
    ended = [0, 0, 0, 0, 0, 143, 0] if SHARDS_ON_CPUS else [0, 0]
    assert ddp_parts.run_two(folder, jobs(config, folder)) == ended
    return folder


def last(folder: Path) -> dict:
    return load_file(latest_checkpoint(folder))


def pairs_of(ours: dict, theirs: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the weights and the optimiser's averages of two checkpoints, in pairs."""
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    pairs = [(ours["state_dict"][key], theirs["state_dict"][key]) for key in theirs["state_dict"]]
    assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()
    for index, state in theirs["optimizer"]["state"].items():
        pairs += [(ours["optimizer"]["state"][index][key], value) for key, value in state.items()]
    assert all(type(one) is type(other) is torch.Tensor for one, other in pairs)
    assert all(one.shape == other.shape for one, other in pairs)
    return pairs


def difference(found: Path, expected: Path) -> float:
    """Largest difference of the final weights and of the optimiser's averages."""
    ours, theirs = last(found), last(expected)
    assert ours["meta"]["iter"] == theirs["meta"]["iter"] == 20
    return max(float((one - other).abs().max()) for one, other in pairs_of(ours, theirs))


@needs_shards
@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("sharded", "plain"),
        ("sharded accumulated", "plain accumulated"),
        ("sharded and recomputed", "plain"),
    ],
)
def test_shards_compute_what_whole_copies_do(runs: Path, found: str, expected: str) -> None:
    losses = [ddp_parts.losses(runs / name) for name in (found, expected)]
    assert len(losses[1]) in (20, 40)
    assert (losses[0] - losses[1]).abs().max() < 1e-8
    assert difference(runs / found, runs / expected) < 1e-8


@needs_shards
def test_a_stopped_sharded_run_continues_as_if_nothing_had_been(runs: Path) -> None:
    assert difference(runs / "stopped", runs / "sharded") == 0.0


@needs_shards
def test_a_sharded_checkpoint_is_continued_by_one_process(runs: Path, tmp_path: Path) -> None:
    options = {**DOUBLE, "train_dataloader.batch_size": 16}
    start = str(runs / "sharded/iter_14.pth")
    train(str(runs / "quick.py"), work_dir=str(tmp_path), options=options, resume=start)
    assert difference(tmp_path, runs / "sharded") < 1e-8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SHARDED, "spreads a model over several processes, but this run has one"),
        (
            {"activation_checkpointing": ["backbone.block"]},
            "no part 'backbone.block'. Did you mean 'backbone.blocks",
        ),
        (
            {"compile": {"parts": ["bakbone"]}},
            r"compile\.parts: the model has no part 'bakbone'. Did you mean 'backbone",
        ),
    ],
)
def test_mistakes_are_named(runs: Path, tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(str(runs / "quick.py"), work_dir=str(tmp_path / "run"), options={**DOUBLE, **options})


@pytest.mark.parametrize("options", [SAVING, {"compile": {"backend": "aot_eager"}}])
def test_one_process_computes_the_same_when_recomputed_or_compiled(
    runs: Path, tmp_path: Path, options: dict
) -> None:
    options = {**DOUBLE, **options, "train_dataloader.batch_size": 16}
    train(str(runs / "quick.py"), work_dir=str(tmp_path), options=options)
    assert difference(tmp_path, runs / "plain") < 1e-8
