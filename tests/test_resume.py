"""A run that was interrupted gives the numbers of one that was not."""
# ruff: noqa: F811

from __future__ import annotations

import errno
import os
import signal
import zipfile
from pathlib import Path

import launches
import pytest
import torch
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from shared.test_shared_engine import toy_project, train_toy  # noqa: F401
from torch import Tensor

from patchreg.registry import HOOKS
from patchreg.runner.build import latest_checkpoint
from patchreg.runner.checkpoint import check_file, seal
from patchreg.runner.stop import TrainingStopped
from patchreg.utils.errors import CheckpointError, ConfigError
from patchreg.utils.weights import load_file


def same(found: object, expected: object, where: str = "") -> None:
    """Check that two parts of checkpoints are equal to the last bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for position, item in enumerate(expected):
            same(found[position], item, f"{where}/{position}")
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


def same_run(found: Path, expected: Path) -> None:
    """Check that two runs ended with the same state and logged the same numbers."""
    ours, theirs = (load_file(latest_checkpoint(folder)) for folder in (found, expected))
    for key in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers"):
        same(ours[key], theirs[key], key)
    assert ours["meta"]["iter"] == theirs["meta"]["iter"] == 40
    logged, known = launches.scalars(found), launches.scalars(expected)
    assert len(known) == 44
    assert logged == known


def test_killed_interrupted_and_terminated_run_equals_the_whole_one(tmp_path: Path) -> None:
    config = launches.quick_config(tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launches.finish(launches.start(config, whole)) == 0
    for step, number, code in (
        (8, signal.SIGKILL, -9),
        (14, signal.SIGINT, 130),
        (25, signal.SIGTERM, 143),
    ):
        run = launches.start(config, parts, "--resume")
        assert launches.signal_after(run, parts, step, number) == code
        assert launches.last_step(parts) < 40
    assert launches.finish(launches.start(config, parts, "--resume")) == 0
    same_run(parts, whole)
    said = parts.with_suffix(".out").read_text()
    assert "Traceback" not in said
    for name in ("SIGINT", "SIGTERM"):
        stopped = next(line for line in said.splitlines() if f"stopped by {name}" in line)
        assert f"checkpoint: {parts}/iter_" in stopped
        assert stopped.endswith(f"train.py {config} --work-dir {parts} --resume")


@HOOKS.register_module()
class DisturbHook(Hook):
    """Send signals, or raise, at one place of a run.

    Args:
        place: Hook point.
        at: Iterations done at that time.
        numbers: Signals to send in a row; none raises an error.
    """

    priority = "HIGHEST"

    def __init__(self, place: str, at: int, numbers: tuple = ()) -> None:
        self.place, self.at, self.numbers = place, at, numbers

    def _act(self, runner: object, place: str) -> None:
        if place == self.place and runner.iter == self.at:
            for number in self.numbers:
                os.kill(os.getpid(), number)
            if not self.numbers:
                raise RuntimeError("the power failed")

    def before_train_iter(self, runner: object, batch_idx: int, data_batch: object = None) -> None:
        """Act before a training iteration."""
        self._act(runner, "train")

    def before_val_iter(self, runner: object, batch_idx: int, data_batch: object = None) -> None:
        """Act within a validation."""
        self._act(runner, "val")


def disturbed(place: str, at: int, *numbers: int) -> dict:
    """Options that add a disturbance to the toy."""
    return {"custom_hooks": [dict(type="DisturbHook", place=place, at=at, numbers=numbers)]}


EVERY_EPOCH = {
    "default_hooks.checkpoint.by_epoch": True,
    "default_hooks.checkpoint.interval": 1,
}


def test_a_stop_is_obeyed_between_two_iterations(toy_project: Path, tmp_path: Path) -> None:
    kinds = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(kind) for kind in kinds]
    with pytest.raises(TrainingStopped) as stopped:
        train_toy(toy_project, tmp_path, **EVERY_EPOCH, **disturbed("train", 5, signal.SIGUSR1))
    assert stopped.value.code == 138
    assert stopped.value.checkpoint == str(tmp_path / "iter_6.pth")
    assert [signal.getsignal(kind) for kind in kinds] == before
    checkpoint = load_file(tmp_path / "iter_6.pth")
    assert (checkpoint["meta"]["epoch"], checkpoint["meta"]["iter"]) == (1, 6)
    with pytest.raises(KeyboardInterrupt):
        train_toy(toy_project, tmp_path, **disturbed("train", 5, signal.SIGINT, signal.SIGINT))
    assert [signal.getsignal(kind) for kind in kinds] == before


@pytest.mark.parametrize("interval", [1, 2], ids=["saved before", "saved after"])
def test_a_stop_within_a_validation_loses_nothing(
    toy_project: Path, tmp_path: Path, interval: int
) -> None:
    ema = dict(type="ModelEMAHook", momentum=0.1)
    options = {**EVERY_EPOCH, "default_hooks.checkpoint.interval": interval}
    whole = train_toy(toy_project, tmp_path / "whole", custom_hooks=[ema], **options)
    disturb = disturbed("val", 4, signal.SIGTERM)["custom_hooks"]
    with pytest.raises(TrainingStopped) as stopped:
        train_toy(toy_project, tmp_path / "parts", custom_hooks=[ema, *disturb], **options)
    # The validation is left at once where its checkpoint exists, with the average in the model's place.
    name = "epoch_1.pth" if interval == 1 else "iter_4.pth"
    assert stopped.value.checkpoint == str(tmp_path / "parts" / name)
    parts = train_toy(toy_project, tmp_path / "parts", custom_hooks=[ema], resume="auto", **options)
    same(parts["state_dict"], whole["state_dict"])
    same(parts["ema_state_dict"], whole["ema_state_dict"])
    assert int(whole["ema_state_dict"]["steps"]) == 12
    assert launches.scalars(tmp_path / "parts") == launches.scalars(tmp_path / "whole")


def test_a_validation_that_was_killed_is_repeated(toy_project: Path, tmp_path: Path) -> None:
    train_toy(toy_project, tmp_path / "whole", **EVERY_EPOCH)
    with pytest.raises(RuntimeError, match="power"):
        train_toy(toy_project, tmp_path / "parts", **EVERY_EPOCH, **disturbed("val", 12))
    assert len(launches.scalars(tmp_path / "parts")) == 14
    train_toy(toy_project, tmp_path / "parts", resume="auto", **EVERY_EPOCH)
    whole = launches.scalars(tmp_path / "whole")
    assert len(whole) == 15
    assert launches.scalars(tmp_path / "parts") == whole


def test_a_complete_run_says_so_and_goes_on_when_more_is_wanted(
    toy_project: Path, tmp_path: Path
) -> None:
    train_toy(toy_project, tmp_path, **EVERY_EPOCH)
    train_toy(toy_project, tmp_path, resume="auto", **EVERY_EPOCH)
    log = sorted(tmp_path.glob("*/*.log"))[-1].read_text()
    assert "training is already complete (3 of 3 epochs)" in log
    assert "raise train_cfg.max_epochs" in log
    more = {**EVERY_EPOCH, "train_cfg.max_epochs": 5}
    assert train_toy(toy_project, tmp_path, resume="auto", **more)["meta"]["iter"] == 20
    assert launches.last_step(tmp_path) == 20


def test_half_accumulated_gradients_are_resumed(toy_project: Path, tmp_path: Path) -> None:
    options = {"optim_wrapper.accumulative_counts": 3}
    whole = train_toy(toy_project, tmp_path / "whole", **options)
    assert "gradients" not in whole
    middle = tmp_path / "whole" / "iter_7.pth"
    assert load_file(middle)["gradients"]["fc.weight"].abs().sum() > 0
    parts = train_toy(toy_project, tmp_path / "parts", resume=str(middle), **options)
    same(parts["state_dict"], whole["state_dict"])
    options["default_hooks.checkpoint.interval"] = 100
    with pytest.raises(TrainingStopped) as stopped:
        train_toy(
            toy_project, tmp_path / "stop", **options, **disturbed("train", 6, signal.SIGTERM)
        )
    assert stopped.value.checkpoint == str(tmp_path / "stop" / "iter_7.pth")
    parts = train_toy(toy_project, tmp_path / "stop", resume="auto", **options)
    same(parts["state_dict"], whole["state_dict"])


def test_the_seed_of_the_checkpoint_reaches_the_data(toy_project: Path, tmp_path: Path) -> None:
    whole = train_toy(toy_project, tmp_path / "whole", **{"randomness.seed": 8})
    middle = str(tmp_path / "whole" / "iter_6.pth")
    parts = train_toy(toy_project, tmp_path / "parts", resume=middle)
    same(parts["state_dict"], whole["state_dict"])


def test_epochs_of_another_length_are_refused_inside_one(toy_project: Path, tmp_path: Path) -> None:
    train_toy(toy_project, tmp_path, **{"train_cfg.max_epochs": 2})
    longer = {"train_dataloader.batch_size": 4}
    with pytest.raises(ConfigError, match="after batch 2 of 4 of an epoch, but epochs have 8"):
        train_toy(toy_project, tmp_path / "b", resume=str(tmp_path / "iter_6.pth"), **longer)


def test_the_last_few_and_the_best_are_kept(toy_project: Path, tmp_path: Path) -> None:
    options = {
        **EVERY_EPOCH,
        "default_hooks.checkpoint.max_keep_ckpts": 2,
        "default_hooks.checkpoint.save_best": "top1",
        "default_hooks.checkpoint.rule": "greater",
    }
    with pytest.raises(TrainingStopped):
        train_toy(toy_project, tmp_path, **options, **disturbed("train", 9, signal.SIGTERM))
    (tmp_path / ".epoch_3.pth.partial").write_bytes(b"left by a killed run")
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert [name for name in names if "best" not in name] == ["epoch_2.pth", "iter_10.pth"]
    train_toy(toy_project, tmp_path, resume="auto", **options)
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert [name for name in names if "best" not in name] == ["epoch_3.pth", "iter_10.pth"]
    assert len([name for name in names if "best" in name]) == 1
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "epoch_3.pth")
    assert not list(tmp_path.glob(".*"))


DAMAGE = {
    "cut off": (lambda data: data[: len(data) // 2], "damaged or truncated"),
    "empty": (lambda data: b"", "is empty"),
    "other bytes": (lambda data: b"x" * len(data), "does not begin"),
    "one bit": (
        lambda data: (
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
        ),
        "does not fit its checksum",
    ),
    "checksum": (lambda data: data[:-1] + (b"0" if data[-1:] != b"0" else b"1"), "checksum"),
}


def test_damaged_checkpoints_are_left_out(toy_project: Path, tmp_path: Path) -> None:
    whole = train_toy(toy_project, tmp_path)
    (tmp_path / "iter_1.pth").replace(tmp_path / "best_top1_iter_1.pth")
    for step in range(2, 7):
        (tmp_path / f"iter_{step}.pth").unlink()
    sound = (tmp_path / "iter_7.pth").read_bytes()
    for step, (damage, _) in zip(range(12, 7, -1), DAMAGE.values(), strict=True):
        path = tmp_path / f"iter_{step}.pth"
        path.write_bytes(damage(path.read_bytes()))
        os.utime(path, (step, step))
    os.utime(tmp_path / "iter_7.pth", (1, 1))
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        train_toy(toy_project, tmp_path / "b", resume=str(tmp_path / "iter_12.pth"))
    assert not (tmp_path / "b").exists()
    resumed = train_toy(toy_project, tmp_path, resume="auto")
    same(resumed["state_dict"], whole["state_dict"])
    log = sorted(tmp_path.glob("*/*.log"))[-1].read_text()
    for step, (_, said) in zip(range(12, 7, -1), DAMAGE.values(), strict=True):
        line = next(line for line in log.splitlines() if f"iter_{step}.pth' is" in line)
        assert said in line
    for step in range(7, 13):
        (tmp_path / f"iter_{step}.pth").write_bytes(sound[:-200])
    with pytest.raises(CheckpointError, match="none of the checkpoints in .* can be read"):
        train_toy(toy_project, tmp_path, resume="auto")


def test_the_checksum_is_in_the_file_and_torch_reads_past_it(tmp_path: Path) -> None:
    plain, sealed = tmp_path / "plain.pth", tmp_path / "sealed.pth"
    torch.save(dict(weight=torch.arange(1000.0)), plain)
    sealed.write_bytes(plain.read_bytes())
    seal(sealed)
    assert torch.equal(load_file(sealed)["weight"], torch.arange(1000.0))
    assert zipfile.ZipFile(sealed).comment.startswith(b"patchreg sha256 ")
    check_file(plain)
    data = bytearray(sealed.read_bytes())
    data[1500] ^= 1
    sealed.write_bytes(data)
    assert not torch.equal(load_file(sealed)["weight"], torch.arange(1000.0))
    with pytest.raises(CheckpointError, match="does not fit its checksum"):
        check_file(sealed)
    plain.write_bytes(bytes(data[: plain.stat().st_size - 2]) + plain.read_bytes()[-2:])
    with pytest.raises(CheckpointError, match="does not fit its checksum"):
        check_file(plain)


def test_a_full_disk_leaves_the_older_checkpoint(
    toy_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = LocalBackend.put

    def full(self: LocalBackend, content: bytes, path: str) -> None:
        put(self, content[:1000], path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(TrainingStopped):
        train_toy(toy_project, tmp_path, **EVERY_EPOCH, **disturbed("train", 5, signal.SIGTERM))
    kept = {"default_hooks.checkpoint.max_keep_ckpts": 1, **EVERY_EPOCH}
    with monkeypatch.context() as patch:
        patch.setattr(LocalBackend, "put", full)
        with pytest.raises(CheckpointError, match=r"epoch_2\.pth' cannot be written \(No space"):
            train_toy(toy_project, tmp_path, resume="auto", **kept)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_6.pth"]
    assert not list(tmp_path.glob(".*"))
    assert train_toy(toy_project, tmp_path, resume="auto", **kept)["meta"]["iter"] == 12
