"""Schedules of optimiser settings in closed form."""

from __future__ import annotations

from typing import Any

from mmengine.optim import _ParamScheduler

from patchreg.registry import PARAM_SCHEDULERS
from patchreg.utils.errors import ConfigError
from patchreg.utils.schedules import warmup_cosine


@PARAM_SCHEDULERS.register_module()
class WarmupCosineParamScheduler(_ParamScheduler):
    """Linear warm-up, then a cosine, of a setting of the parameter groups, as DINO schedules it.

    Each group starts from its own setting; a group whose setting is 0 (biases and norms without
    weight decay) stays at 0, unless the setting of all is 0. See
    `patchreg.utils.schedules.warmup_cosine` for the formula.

    Source:
        `cosine_scheduler` and the training loop of the official DINO.

    Args:
        optimizer: Optimizer wrapper.
        param_name: Setting of the groups, such as `lr` or `weight_decay`.
        final: Value that the cosine goes to, for all groups.
        warmup: Length of the warm-up, in epochs, or in iterations with `by_epoch=False`; a fraction of
            an epoch is possible with `convert_to_iter_based=True`.
        start: First value of the warm-up.
        end: Length of the whole, in the same unit; the engine fills in that of the training.
        by_epoch: Step after every epoch, not every iteration; `convert_to_iter_based=True` counts in
            epochs and steps by iteration.
        kwargs: `last_step`, `verbose` of MMEngine's schedulers.

    Raises:
        ConfigError: The warm-up is longer than the training.

    Differs from official:
        MMEngine's own cosine is recursive, cannot start a warm-up at 0, and gives weight decay to the
        groups without it.
    """

    def __init__(
        self,
        optimizer: Any,
        param_name: str,
        final: float,
        warmup: float = 0,
        start: float = 0.0,
        end: int = 0,
        by_epoch: bool = True,
        **kwargs: Any,
    ) -> None:
        if end < 1:
            raise ConfigError(
                f"param_scheduler of {param_name}: the training has no {'epoch' if by_epoch else 'iteration'}; "
                "is train_dataloader.batch_size larger than the data set (drop_last), or max_epochs 0?"
            )
        if not 0 <= warmup <= end or warmup != int(warmup):
            raise ConfigError(
                f"param_scheduler of {param_name}: a warm-up of {warmup} does not fit into a training of "
                f"{end} {'epochs' if by_epoch else 'iterations'}; shorten it, train longer, or set "
                "convert_to_iter_based=True for a fraction of an epoch"
            )
        self.final, self.warmup, self.start, self.steps = final, int(warmup), start, end
        super().__init__(optimizer, param_name, end=end, by_epoch=by_epoch, **kwargs)

    @classmethod
    def build_iter_from_epoch(
        cls,
        *args: Any,
        epoch_length: int,
        warmup: float = 0,
        end: int = 0,
        by_epoch: bool = True,
        **kwargs: Any,
    ) -> WarmupCosineParamScheduler:
        """Build the scheduler for steps after every iteration from lengths in epochs.

        Args:
            args: As in the constructor.
            epoch_length: Iterations of an epoch.
            warmup: Length of the warm-up in epochs.
            end: Length of the whole in epochs.
            by_epoch: Must be True, as MMEngine passes it.
            kwargs: As in the constructor.

        Raises:
            ConfigError: `by_epoch` is False.
        """
        if not by_epoch:
            raise ConfigError("convert_to_iter_based=True needs by_epoch=True")
        kwargs.update(warmup=round(warmup * epoch_length), end=end * epoch_length)
        return cls(*args, by_epoch=False, **kwargs)

    def _get_value(self) -> list[float]:
        return [
            warmup_cosine(self.last_step, self.steps, base, self.final, self.warmup, self.start)
            if base or scheduled
            else 0.0
            for base, scheduled in zip(self.base_values, self._scheduled(), strict=True)
        ]

    def _scheduled(self) -> list[bool]:
        """Return which groups follow the schedule although their own setting is 0.

        A weight decay that begins at 0 tells nobody which groups are without: the constructor of the
        optimizer wrapper notes it, and where it made no such groups, all follow.
        """
        groups = self.optimizer.param_groups
        if self.param_name != "weight_decay" or any(self.base_values):
            return [False] * len(groups)
        if not any("decays" in group for group in groups):
            return [True] * len(groups)
        return [bool(group.get("decays")) for group in groups]
