"""Training loops that continue in the middle of an epoch and key every draw by the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import get_dist_info
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch.utils.data import DataLoader

from patchreg.registry import LOOPS
from patchreg.utils.errors import ConfigError
from patchreg.utils.random import batch_random, mix_seed, seed_all


def begin_step(runner: Any, iteration: int) -> None:
    """Key all draws of one training iteration by (seed, step).

    The global generators are seeded per process, for what does not use `batch_random`.

    Args:
        runner: The runner of the training.
        iteration: Iteration from 0; several iterations make a step when gradients are accumulated.
    """
    rank, world = get_dist_info()
    parts = getattr(runner.optim_wrapper, "_accumulative_counts", 1)
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
            f"cannot resume inside an epoch: the sampler {type(sampler).__name__} has no 'skip'; use a sampler of "
            "patchreg (DefaultSampler, RepeatedAugmentationSampler), or resume from the end of an epoch"
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


@LOOPS.register_module()
class EpochLoop(EpochBasedTrainLoop):
    """Epoch-based training; what `train_cfg = dict(by_epoch=True, ...)` builds.

    Differs from official:
        MMEngine's loop starts an epoch anew when a run is resumed inside it, and leaves random draws to the
        state that the processes happen to be in.
    """

    def run_epoch(self) -> None:
        """Run what is left of the current epoch."""
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        set_epoch(self.dataloader, self._epoch)
        done = self._iter - self._epoch * len(self.dataloader)
        skip_batches(self.dataloader, done)
        with keyed_loop():
            for index, batch in enumerate(self.dataloader, done):
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
        self.runner.call_hook("before_train")
        self._epoch = self._iter // len(self.dataloader)
        self.runner.call_hook("before_train_epoch")
        batches = self._batches()
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            with keyed_loop():
                self.run_iter(next(batches))
            self._decide_current_val_interval()
            if (
                self.runner.val_loop is not None
                and self._iter >= self.val_begin
                and (self._iter % self.val_interval == 0 or self._iter == self._max_iters)
            ):
                self.runner.val_loop.run()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

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
