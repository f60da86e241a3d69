"""What tools/train.py and tools/test.py do, for use from Python too."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine.config import Config

from patchreg.runner.build import (
    build_runner,
    config_errors,
    latest_checkpoint,
    load_config,
    resolve_checkpoint,
)
from patchreg.runner.explain import describe
from patchreg.runner.rehearsal import rehearse
from patchreg.utils.errors import ConfigError, MissingFileError, ProcessLostError, UserError
from patchreg.utils.weights import how_to_get

_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection (was )?closed|timed out waiting|gloo.*timeout"
    r"|nccl.*(remote|abort|timeout)",
    re.IGNORECASE,
)
_NO_WRITING = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)


def train(
    path: str,
    *,
    work_dir: str | None = None,
    resume: str | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    options: Mapping[str, Any] | None = None,
    launcher: str = "none",
    seed: int | None = None,
    dry_run: bool = False,
    moved: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Train the model of a config, or run its stages.

    Args:
        path: Config file.
        work_dir: Where the run writes.
        resume: `auto`, or a checkpoint to continue from.
        amp: Whether to train in mixed precision.
        auto_scale_lr: Whether to scale the learning rate to the real batch size.
        options: Overrides by dotted key.
        launcher: What started the processes: none, pytorch, slurm or mpi.
        seed: Seed of the run.
        dry_run: Whether to print the flow of the config and stop.
        moved: Where earlier stages wrote instead of their usual work dirs.

    Returns:
        The metrics of the last validation; empty after stages and after a dry run.

    Raises:
        UserError: Something given is wrong; nothing is left behind.
    """
    config = load_config(path, options, work_dir, moved)
    if resume is None and _restarted():
        resume = "auto"
    if "stages" in config:
        from patchreg.runner.stages import run_stages

        shared = dict(amp=amp, auto_scale_lr=auto_scale_lr, launcher=launcher, seed=seed)
        run_stages(config, resume=resume is not None, dry_run=dry_run, **shared)
        return {}
    _apply(config, launcher, seed)
    if amp:
        _use_amp(config)
    if auto_scale_lr:
        if not config.get("auto_scale_lr", {}).get("base_batch_size"):
            raise ConfigError(
                "--auto-scale-lr: the config does not say for which batch size its learning rate is meant; add "
                "auto_scale_lr=dict(base_batch_size=...)"
            )
        config.auto_scale_lr.enable = True
    if resume == "auto":
        # What the run itself has written comes before the weights that it began with.
        if latest_checkpoint(config.work_dir) is not None:
            config.load_from = None
        config.resume = config.get("load_from") is None
    elif resume is not None:
        config.resume = True
        config.load_from = _existing(resume)
    if dry_run:
        rehearse(config)
        print(describe(config))
        return {}
    if config.get("train_cfg") is None:
        raise ConfigError(
            f"'{path}' has no train_cfg: there is nothing to train; evaluate it with tools/test.py"
        )
    with process_group():
        with leave_nothing_behind(config.work_dir):
            runner = build_runner(config)
            with config_errors("the training cannot be set up"):
                runner.prepare("train")
        with _told_by_every_process():
            runner.train()
        scalars = runner.message_hub.log_scalars
        return {
            key[4:]: float(value.current()) for key, value in scalars.items() if key[:4] == "val/"
        }


def evaluate(
    path: str,
    checkpoint: str | None = None,
    *,
    work_dir: str | None = None,
    options: Mapping[str, Any] | None = None,
    launcher: str = "none",
    seed: int | None = None,
    dry_run: bool = False,
    moved: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Evaluate a checkpoint on the test set of a config.

    Args:
        path: Config file.
        checkpoint: Weights; by default `load_from` of the config, or what its parts load themselves.
        work_dir: Where the run writes.
        options: Overrides by dotted key.
        launcher: What started the processes: none, pytorch, slurm or mpi.
        seed: Seed of the run.
        dry_run: Whether to print the flow of the config and stop.
        moved: Where earlier stages wrote instead of their usual work dirs.

    Returns:
        The metrics; empty after a dry run.

    Raises:
        UserError: Something given is wrong.
    """
    if checkpoint is not None and os.path.isfile(path):
        # Before the config is checked: the one that it names itself need not exist.
        options = {**(options or {}), "load_from": _existing(checkpoint)}
    config = load_config(path, options, work_dir, moved)
    _apply(config, launcher, seed)
    training_data = config.get("train_dataloader")
    for key in ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler"):
        config.pop(key, None)
    if dry_run:
        rehearse(config)
        print(describe(config))
        return {}
    if config.get("test_cfg") is None:
        raise ConfigError(
            f"'{path}' has no test_cfg, test_dataloader and test_evaluator: nothing to evaluate"
        )
    with process_group():
        with leave_nothing_behind(config.work_dir):
            runner = build_runner(config)
            # Nothing is trained, but a hook may want training images to calibrate on.
            runner.cfg.train_dataloader = training_data
            with config_errors("the evaluation cannot be set up"):
                runner.prepare("test")
        if config.get("load_from") is None and "Pretrained" not in str(config.model):
            runner.logger.warning(
                "no checkpoint given: the model is evaluated as it was initialised"
            )
        return runner.test()


@contextmanager
def _told_by_every_process() -> Iterator[None]:
    """Let errors of the training itself be printed by the process that has them, whichever it is.

    Raises:
        ProcessLostError: Another process of the run has gone.
        UserError: Logs cannot be written any more; checkpoints say so themselves.
    """
    try:
        yield
    except UserError as error:
        error.own = True
        raise
    except OSError as error:
        if error.errno not in _NO_WRITING:
            raise
        full = UserError(
            f"the run cannot write its logs any more ({error.strerror}); its checkpoints are as they were: "
            "make room or mend the folder, then continue with --resume"
        )
        full.own = True
        raise full from error
    except RuntimeError as error:
        if not dist.is_initialized() or not _LOST.search(str(error)):
            raise
        lost = ProcessLostError(
            "the connection to another process of this run is lost; that process's own error stands "
            "above this line or in the log of its task. Continue from the newest checkpoint with --resume "
            f"({str(error).splitlines()[0][:200]})"
        )
        lost.own = True
        raise lost from error


def _restarted() -> bool:
    """Whether the launcher has started this run before: torchrun after a failure, SLURM after a requeue."""
    return any(
        int(os.environ.get(name, 0)) > 0
        for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    )


def _apply(config: Config, launcher: str, seed: int | None) -> None:
    config.launcher = launcher
    if seed is not None:
        config.randomness = {**(config.get("randomness") or {}), "seed": seed}


def _use_amp(config: Config) -> None:
    wrapper = config.optim_wrapper
    kind = wrapper.get("type", "OptimWrapper")
    if kind not in ("OptimWrapper", "AmpOptimWrapper"):
        raise ConfigError(f"--amp works with OptimWrapper, but optim_wrapper.type is '{kind}'")
    wrapper.type = "AmpOptimWrapper"


def _existing(path: str) -> str:
    found = resolve_checkpoint(path)
    if not os.path.isfile(found):
        raise MissingFileError(f"checkpoint '{path}' does not exist; {how_to_get(path)}")
    return found


@contextmanager
def leave_nothing_behind(work_dir: str) -> Iterator[None]:
    """Remove what a run that could not start has written to its work dir.

    Args:
        work_dir: Folder of the run.
    """
    folder = Path(work_dir)
    made = [item for item in (folder, *folder.parents) if not item.exists()]
    before = set(folder.iterdir()) if not made else set()
    kept = {item: item.read_bytes() for item in before if item.suffix == ".py"}
    try:
        yield
    except UserError:
        if folder.is_dir():
            for item in set(folder.iterdir()) - before:
                if item.is_dir():
                    shutil.rmtree(item, ignore_errors=True)
                else:
                    item.unlink(missing_ok=True)
            for item, content in kept.items():
                if not item.is_file() or item.read_bytes() != content:
                    item.write_bytes(content)
            for item in made:
                item.rmdir()
        raise


@contextmanager
def process_group() -> Iterator[None]:
    """Leave the process group at the end, also when a run fails, so that the others notice at once.

    A group that existed before is left alone.
    """
    existed = dist.is_initialized()
    try:
        yield
    finally:
        if dist.is_initialized() and not existed:
            dist.destroy_process_group()
