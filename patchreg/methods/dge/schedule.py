"""Learning-rate schedule of DeiT's recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.optim import _ParamScheduler

from patchreg.registry import PARAM_SCHEDULERS
from patchreg.utils.errors import ConfigError


@PARAM_SCHEDULERS.register_module()
class DeiTCosineLR(_ParamScheduler):
    """Cosine with linear warm-up over epochs, exactly as the official DeiT and DGE runs used it.

    f(t) = warmup_lr + t (lr - warmup_lr) / warmup_epochs for t < warmup_epochs, else
    eta_min + 0.5 (lr - eta_min) (1 + cos(pi t / T_max)); the cosine is not shifted by the warm-up.
    Epoch e uses f(max(e - lag, 0)).

    Source:
        timm's cosine scheduler as stepped by DeiT's training script.

    Args:
        optimizer: Optimizer wrapper whose learning rate is scheduled.
        T_max: Length of the cosine in epochs, at least 1.
        warmup_epochs: Epochs of warm-up, 0 for none.
        warmup_lr: Learning rate at the start of the warm-up.
        eta_min: Learning rate the cosine ends at.
        lag: Epochs by which the schedule is late: 1 as published, 0 for the textbook form.
        linear_warmup: Also raise the rate within the epochs `lag` .. `warmup_epochs` + `lag` - 1,
            by lr / (warmup epochs x iterations per epoch) after every iteration; needs
            `convert_to_iter_based=True`.
        noise_range: Start, or start and end, as fractions of `T_max`, between which the rate is
            multiplied by 1 + n; None for no noise.
        noise_pct: Bound of |n|; n is drawn from N(0, 1) until it is below.
        seed: Seed of the noise; epoch t draws with seed + t.
        epoch_length: Iterations of an epoch when stepped by iteration.
        by_epoch: Step after every epoch, not every iteration.
        kwargs: `begin`, `end`, `last_step`, `verbose` of MMEngine's schedulers.

    Raises:
        ConfigError: Values that do not fit together.
    """

    def __init__(
        self,
        optimizer: Any,
        T_max: int,  # noqa: N803 - the field's name for it
        warmup_epochs: int = 5,
        warmup_lr: float = 1e-6,
        eta_min: float = 1e-5,
        lag: int = 1,
        linear_warmup: bool = False,
        noise_range: Sequence[float] | None = None,
        noise_pct: float = 0.67,
        seed: int = 0,
        epoch_length: int | None = None,
        by_epoch: bool = True,
        **kwargs: Any,
    ) -> None:
        if T_max < 1 or warmup_epochs < 0 or lag < 0 or noise_pct <= 0:
            raise ConfigError(
                f"T_max={T_max}, warmup_epochs={warmup_epochs}, lag={lag}, noise_pct={noise_pct}: "
                "expected T_max >= 1, warmup_epochs and lag >= 0, noise_pct > 0"
            )
        if by_epoch and linear_warmup:
            raise ConfigError(
                "linear_warmup=True changes the rate within an epoch: "
                "set convert_to_iter_based=True"
            )
        if not by_epoch and not epoch_length:
            raise ConfigError(
                "by_epoch=False needs epoch_length; set convert_to_iter_based=True instead"
            )
        self.T_max = T_max
        self.warmup_epochs = warmup_epochs
        self.warmup_lr = warmup_lr
        self.eta_min = eta_min
        self.lag = lag
        self.linear_warmup = linear_warmup
        self.noise_range = None if noise_range is None else [part * T_max for part in noise_range]
        self.noise_pct = noise_pct
        self.seed = seed
        self.epoch_length = 1 if by_epoch or epoch_length is None else epoch_length
        super().__init__(optimizer, param_name="lr", by_epoch=by_epoch, **kwargs)

    @classmethod
    def build_iter_from_epoch(
        cls, *args: Any, epoch_length: int, by_epoch: bool = True, **kwargs: Any
    ) -> DeiTCosineLR:
        """Build the scheduler for steps after every iteration; lengths stay in epochs.

        Args:
            args: As in the constructor.
            epoch_length: Iterations of an epoch.
            by_epoch: Must be True, as MMEngine passes it.
            kwargs: As in the constructor.

        Raises:
            ConfigError: `by_epoch` is False.
        """
        if not by_epoch:
            raise ConfigError("convert_to_iter_based=True needs by_epoch=True")
        return cls(*args, epoch_length=epoch_length, by_epoch=False, **kwargs)

    def rate(self, lr: float, epoch: int, iteration: int = 0) -> float:
        """Return the learning rate of an iteration.

        Args:
            lr: Full learning rate.
            epoch: Epoch, from 0.
            iteration: Iteration within the epoch, from 0.
        """
        t = max(epoch - self.lag, 0)
        if t < self.warmup_epochs:
            value = self.warmup_lr + t * (lr - self.warmup_lr) / self.warmup_epochs
        else:
            value = self.eta_min + 0.5 * (lr - self.eta_min) * (
                1 + math.cos(math.pi * t / self.T_max)
            )
        if epoch >= self.lag:
            value += value * self._noise(t)
        if self.linear_warmup and self.lag <= epoch < self.warmup_epochs + self.lag:
            value += iteration * lr / (self.warmup_epochs * self.epoch_length)
        return value

    def _noise(self, t: int) -> float:
        if (
            self.noise_range is None
            or t < self.noise_range[0]
            or t >= [*self.noise_range, math.inf][1]
        ):
            return 0.0
        generator = torch.Generator().manual_seed(self.seed + t)
        while True:
            noise = torch.randn(1, generator=generator).item()
            if abs(noise) < self.noise_pct:
                return noise

    def _get_value(self) -> list[float]:
        epoch, iteration = divmod(self.last_step, self.epoch_length)
        return [self.rate(lr, epoch, iteration) for lr in self.base_values]
