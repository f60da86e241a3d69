"""MMEngine's bookkeeping of scalars and times, written in blocks instead of in every iteration."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from mmengine.hooks import IterTimerHook as _IterTimerHook
from mmengine.hooks import LoggerHook
from mmengine.hooks import RuntimeInfoHook as _RuntimeInfoHook
from mmengine.logging import HistoryBuffer, MessageHub
from torch import Tensor

from patchreg.registry import HOOKS


class ScalarBlock:
    """Scalars of the iterations since the last time they were written to the message hub.

    MMEngine's hub copies a scalar's whole history for every new value and reads tensors at once, which on a GPU
    waits for the device in every iteration. A block is written when it is read: at the logger's interval, at
    the end of an epoch, and before a checkpoint.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}
        self._interval = 1
        self._batches = 1

    def start(self, runner: Any) -> None:
        """Find out when the scalars will be read.

        Args:
            runner: The runner of the training.
        """
        intervals = [hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)]
        self._interval = math.gcd(*intervals) if intervals else 10
        self._batches = len(runner.train_dataloader)

    def keep(self, key: str, value: Any) -> None:
        """Remember one value.

        Args:
            key: Name of the scalar.
            value: Number, or tensor with one element.
        """
        if isinstance(value, Tensor):
            value = value.detach()
        self._values.setdefault(key, []).append(value)

    def due(self, batch_idx: int) -> bool:
        """Whether somebody may read the scalars after this iteration.

        Args:
            batch_idx: Batch within the epoch.
        """
        return (batch_idx + 1) % self._interval == 0 or batch_idx + 1 == self._batches

    def write(self, hub: MessageHub) -> None:
        """Move the values to the message hub.

        Args:
            hub: The hub of the run.
        """
        for key, values in self._values.items():
            if isinstance(values[0], Tensor):
                values = torch.stack(values).double().tolist()
            hub.update_scalar(key, values[0])
            if len(values) > 1:
                buffer = hub.log_scalars[key]
                history, counts = buffer.data
                hub.log_scalars[key] = HistoryBuffer(
                    np.concatenate((history, values[1:])),
                    np.concatenate((counts, np.ones(len(values) - 1, dtype=np.int64))),
                    buffer.max_length,
                )
        self._values.clear()


@HOOKS.register_module()
class RuntimeInfoHook(_RuntimeInfoHook):
    """Keep epoch, iteration, losses and learning rates of a run.

    Differs from official:
        Losses and learning rates reach the message hub when they are logged, see `ScalarBlock`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._block = ScalarBlock()

    def before_train(self, runner: Any) -> None:
        """Start the bookkeeping."""
        super().before_train(runner)
        self._block.start(runner)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Tell the iteration."""
        runner.message_hub.update_info("iter", runner.iter)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Keep the losses; write them, and the learning rates, when they may be read."""
        for key, value in (outputs or {}).items():
            self._block.keep(f"train/{key}", value)
        if self._block.due(batch_idx):
            for name, rates in runner.optim_wrapper.get_lr().items():
                self._block.keep(f"train/{name}", rates[0])
            self._block.write(runner.message_hub)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Write what is still kept, so that a resumed run logs the same averages."""
        self._block.write(runner.message_hub)
        checkpoint["message_hub"] = runner.message_hub.state_dict()


@HOOKS.register_module()
class IterTimerHook(_IterTimerHook):
    """Measure the time of loading and of the whole iteration, and the time left.

    Differs from official:
        Times of training reach the message hub when they are logged, see `ScalarBlock`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._block = ScalarBlock()
        self._first = 0
        self._begun = 0.0

    def before_train(self, runner: Any) -> None:
        """Start the clocks."""
        super().before_train(runner)
        self._block.start(runner)
        self._first = runner.iter
        self._begun = 0.0

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Take the time of loading."""
        self._block.keep("train/data_time", time.time() - self.t)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Take the time of the iteration; tell the time left when it may be read."""
        now = time.time()
        spent = now - self.t
        self.t = now
        self._begun += spent
        self._block.keep("train/time", spent)
        if self._block.due(batch_idx):
            self._block.write(runner.message_hub)
            average = self._begun / (runner.iter - self._first + 1)
            runner.message_hub.update_info("eta", average * (runner.max_iters - runner.iter - 1))

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Write what is still kept."""
        self._block.write(runner.message_hub)
