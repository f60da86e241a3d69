"""Training that has broken down is stopped, not continued."""

from __future__ import annotations

import math
from typing import Any

from mmengine.hooks import Hook

from patchreg.registry import HOOKS
from patchreg.utils.errors import ConfigError


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """End the training when the loss is not finite, before a checkpoint is written.

    Source:
        The training loop of the official DINO.

    Args:
        interval: Iterations between two checks, at least 1; a check waits for the device.

    Raises:
        ConfigError: `interval` is below 1; during training, the loss is not finite.
    """

    def __init__(self, interval: int = 1) -> None:
        if interval < 1:
            raise ConfigError(f"FiniteLossHook: interval={interval}: expected at least 1")
        self.interval = interval

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Look at the loss.

        Args:
            runner: The runner of the training.
            batch_idx: Batch within the epoch.
            data_batch: Not used.
            outputs: Losses of the iteration.
        """
        if not self.every_n_train_iters(runner, self.interval):
            return
        loss = float(outputs["loss"])
        if not math.isfinite(loss):
            raise ConfigError(
                f"the loss is {loss} at iteration {runner.iter + 1}; the checkpoints before it are as they "
                "were. Lower the learning rate or the gradient clip, use bfloat16 instead of float16, or "
                "warm up longer"
            )
