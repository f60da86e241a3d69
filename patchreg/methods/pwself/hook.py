"""The teacher of PW-Self over the course of the training."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from patchreg.registry import HOOKS
from patchreg.utils.errors import ConfigError
from patchreg.utils.schedules import linear_warmup, warmup_cosine


@HOOKS.register_module()
class PWSelfTeacherHook(Hook):
    """Move the teacher after every step, and set its temperature in every epoch.

    The momentum follows a cosine over all iterations; the temperature rises linearly over the first
    epochs and then stays.

    Source:
        The training loop and `DINOLoss` of the official DINO.

    Args:
        momentum: Weight of the teacher's own value at the start, in [0, 1].
        final_momentum: The same at the end.
        temperature: Temperature of the teacher after the warm-up, above 0.
        warmup_temperature: Temperature in the first epoch, above 0.
        warmup_epochs: Epochs from the one to the other, at least 0.

    Raises:
        ConfigError: A value is out of its range; when training begins, the warm-up is longer than it.
    """

    def __init__(
        self,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        temperature: float = 0.04,
        warmup_temperature: float = 0.04,
        warmup_epochs: int = 0,
    ) -> None:
        if not (0 <= momentum <= 1 and 0 <= final_momentum <= 1):
            raise ConfigError(
                f"momentum={momentum}, final_momentum={final_momentum}: expected both in [0, 1]"
            )
        if min(temperature, warmup_temperature) <= 0 or warmup_epochs < 0:
            raise ConfigError(
                f"temperature={temperature}, warmup_temperature={warmup_temperature}, warmup_epochs="
                f"{warmup_epochs}: expected temperatures above 0 and warmup_epochs >= 0"
            )
        self.momentum, self.final_momentum = momentum, final_momentum
        self.temperature, self.warmup_temperature = temperature, warmup_temperature
        self.warmup_epochs = warmup_epochs

    def before_train(self, runner: Any) -> None:
        """Check the lengths.

        Args:
            runner: The runner of the training.
        """
        epochs = -(-runner.max_iters // len(runner.train_dataloader))
        if self.warmup_epochs > epochs:
            raise ConfigError(
                f"PWSelfTeacherHook: warmup_epochs={self.warmup_epochs} is longer than the training of "
                f"{epochs} epochs"
            )

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Set the temperature.

        Args:
            runner: The runner of the training.
            batch_idx: Batch within the epoch.
            data_batch: Not used.
        """
        _bare(runner).criterion.teacher_temperature = linear_warmup(
            runner.epoch, self.warmup_temperature, self.temperature, self.warmup_epochs
        )

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Move the teacher, unless gradients are still being accumulated.

        Args:
            runner: The runner of the training.
            batch_idx: Batch within the epoch.
            data_batch: Not used.
            outputs: Not used.
        """
        if runner.optim_wrapper.should_update():
            _bare(runner).update_teacher(
                warmup_cosine(runner.iter, runner.max_iters, self.momentum, self.final_momentum)
            )


def _bare(runner: Any) -> Any:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
