"""Training loops that continue in the middle of an epoch and key every draw by the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import get_dist_info
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch.utils.data import DataLoader

from patchreg.hooks.checkpoint import CheckpointHook
from patchreg.registry import LOOPS
from patchreg.runner.stop import LeaveValidation, StopSignals
from patchreg.utils.errors import ConfigError
from patchreg.utils.random import batch_random, mix_seed, seed_all


def parts_per_step(runner: Any) -> int:
    """Return the iterations whose gradients are accumulated for one optimisation step.

    Args:
        runner: The runner of the training.
    """
    return getattr(runner.optim_wrapper, "_accumulative_counts", 1)


def begin_step(runner: Any, iteration: int) -> None:
    """Key all draws of one training iteration by (seed, step).

    The global generators are seeded per process, for what does not use `batch_random`.

    Args:
        runner: The runner of the training.
        iteration: Iteration from 0; several iterations make a step when gradients are accumulated.
    """
    rank, world = get_dist_info()
    parts = parts_per_step(runner)
    seed_all(mix_seed(runner.seed, iteration, rank))
    batch_random.begin(
        runner.seed,
        iteration // parts,
        part=iteration % parts,
        parts=parts,
        rank=rank,
        world=world,
    )


@contextmanager
def keyed_loop() -> Iterator[None]:
    """Return to the global generators at the end, also when the loop is left by an error."""
    batch_random.in_loop = True
    try:
        yield
    finally:
        batch_random.in_loop = False
        batch_random.end()


def skip_batches(loader: DataLoader, batches: int) -> None:
    """Let the next pass over a loader start some batches later, without loading what is skipped.

    Args:
        loader: The training loader.
        batches: Batches of this process that are done.

    Raises:
        ConfigError: The sampler cannot skip.
    """
    if batches == 0:
        return
    sampler = loader.sampler
    if not hasattr(sampler, "skip"):
        raise ConfigError(
            f"cannot resume inside an epoch: the sampler {type(sampler).__name__} has no 'skip'; "
            "use a sampler of patchreg (DefaultSampler, RepeatedAugmentationSampler), or resume "
            "from the end of an epoch"
        )
    sampler.skip(batches * (loader.batch_size or 1))


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Tell the sampler of a loader which epoch comes next.

    Args:
        loader: The training loader.
        epoch: Epoch from 0.
    """
    if hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)


def validate(runner: Any, stop: StopSignals) -> None:
    """Run a validation; its draws depend on the iteration alone.

    A signal ends it at once where a resumed run would repeat it anyway: one process, and the state before the
    validation on disk. Otherwise it is run to its end first.

    Args:
        runner: The runner of the training.
        stop: The signals of the run.
    """
    rank, world = get_dist_info()
    seed_all(mix_seed(runner.seed, runner.iter, rank))
    hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    stop.leave_at_once = world == 1 and bool(hooks) and hooks[0].has_position(runner.iter)
    try:
        if stop.leave_at_once and stop.number:
            raise LeaveValidation
        runner.val_loop.run()
    except LeaveValidation:
        stop.stop(runner, stop.number)
    finally:
        stop.leave_at_once = False


def validated(runner: Any) -> int:
    """Return the iteration whose validation a resumed checkpoint includes, or -1.

    Args:
        runner: The runner of the training.
    """
    return runner.message_hub.runtime_info.get("last_validation", -1)


def tell_if_complete(runner: Any, done: int, last: int, unit: str) -> None:
    """Say that a resumed run has nothing left to train.

    Args:
        runner: The runner of the training.
        done: Epochs or iterations done.
        last: Epochs or iterations wanted.
        unit: `epochs` or `iters`, as in `train_cfg.max_epochs`.
    """
    if done >= last > 0:
        runner.logger.info(
            f"training is already complete ({done} of {last} {unit}); raise train_cfg.max_{unit} to go on"
        )


@LOOPS.register_module()
class EpochLoop(EpochBasedTrainLoop):
    """Epoch-based training; what `train_cfg = dict(by_epoch=True, ...)` builds.

    SIGINT, SIGTERM and SIGUSR1 stop it between two iterations, see `StopSignals`.

    Differs from official:
        MMEngine's loop starts an epoch anew when a run is resumed inside it, leaves out the validation in
        which a run was killed, and leaves random draws to the state that the processes happen to be in.
    """

    def run(self) -> torch.nn.Module:
        """Train until the last epoch."""
        runner = self.runner
        runner.call_hook("before_train")
        done = self._max_epochs if self._iter >= self._max_iters else self._epoch
        tell_if_complete(runner, done, self._max_epochs, "epochs")
        with StopSignals(parts_per_step(runner)) as self._stop:
            at_its_end = self._iter > 0 and self._begun()[0] < self._epoch
            if at_its_end and validated(runner) != self._iter:
                self._validate()
            while self._epoch < self._max_epochs and not self.stop_training:
                self.run_epoch()
                self._validate()
        runner.call_hook("after_train")
        return runner.model

    def _begun(self) -> tuple[int, int, int]:
        """Return the epoch that was begun last, the iterations before it, and its batches."""
        batches = len(self.dataloader)
        usual = (self._epoch, self._epoch * batches, batches)
        epoch, first, size = self.runner.message_hub.runtime_info.get("epoch_begun", usual)
        return epoch, first, size

    def _validate(self) -> None:
        self._decide_current_val_interval()
        if (
            self.runner.val_loop is not None
            and self._epoch >= self.val_begin
            and (self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs)
        ):
            validate(self.runner, self._stop)

    def _batches_done(self) -> int:
        """Return the batches of the current epoch that are done.

        Raises:
            ConfigError: The run was stopped inside an epoch of another length.
        """
        batches = len(self.dataloader)
        epoch, first, size = self._begun()
        done = self._iter - first if epoch == self._epoch else 0
        if done and size != batches:
            raise ConfigError(
                f"the checkpoint was written after batch {done} of {size} of an epoch, but epochs "
                f"have {batches} batches now; resume with the same data and "
                "batch size x processes, or from the end of an epoch"
            )
        self.runner.message_hub.update_info(
            "epoch_begun", [self._epoch, self._iter - done, batches]
        )
        return done

    def run_epoch(self) -> None:
        """Run what is left of the current epoch."""
        done = self._batches_done()
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        set_epoch(self.dataloader, self._epoch)
        skip_batches(self.dataloader, done)
        with keyed_loop():
            for index, batch in enumerate(self.dataloader, done):
                self._stop.obey(self.runner)
                self.run_iter(index, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Run one iteration with keyed draws.

        Args:
            idx: Batch within the epoch.
            data_batch: What the loader gave.
        """
        begin_step(self.runner, self._iter)
        super().run_iter(idx, data_batch)


@LOOPS.register_module()
class IterLoop(IterBasedTrainLoop):
    """Iteration-based training over repeated epochs; what `train_cfg = dict(by_epoch=False, ...)` builds.

    Differs from official:
        MMEngine's loop reads and throws away the batches that a resumed run has seen; this one skips them in
        the sampler.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The parent starts an iterator (and its workers) that this loop does not use.
        del self.dataloader_iterator

    def run(self) -> torch.nn.Module:
        """Train until the last iteration."""
        runner = self.runner
        runner.call_hook("before_train")
        tell_if_complete(runner, self._iter, self._max_iters, "iters")
        self._epoch = self._iter // len(self.dataloader)
        runner.call_hook("before_train_epoch")
        batches = self._batches()
        with StopSignals(parts_per_step(runner)) as self._stop:
            if self._iter > 0 and validated(runner) != self._iter:
                self._validate()
            while self._iter < self._max_iters and not self.stop_training:
                self._stop.obey(runner)
                runner.model.train()
                with keyed_loop():
                    self.run_iter(next(batches))
                self._validate()
        runner.call_hook("after_train_epoch")
        runner.call_hook("after_train")
        return runner.model

    def _validate(self) -> None:
        self._decide_current_val_interval()
        if (
            self.runner.val_loop is not None
            and self._iter >= self.val_begin
            and (self._iter % self.val_interval == 0 or self._iter == self._max_iters)
        ):
            validate(self.runner, self._stop)

    def _batches(self) -> Iterator[Any]:
        done = self._iter % len(self.dataloader)
        while True:
            set_epoch(self.dataloader, self._epoch)
            skip_batches(self.dataloader, done)
            yield from self.dataloader
            done = 0
            self._epoch += 1

    def run_iter(self, data_batch: Any) -> None:
        """Run one iteration with keyed draws.

        Args:
            data_batch: What the loader gave.
        """
        begin_step(self.runner, self._iter)
        super().run_iter(data_batch)
