"""Moving average of a model, kept and evaluated beside it."""

from __future__ import annotations

import torch
from mmengine.hooks import EMAHook
from mmengine.model import BaseAveragedModel
from torch import Tensor, nn

from patchreg.registry import HOOKS, MODELS
from patchreg.utils.errors import ConfigError


@MODELS.register_module()
class ModelEMA(BaseAveragedModel):
    """Exponential moving average of the whole state of a model, from its first step on.

    averaged = (1 - momentum) averaged + momentum source, for every floating parameter and buffer;
    integer state is copied.

    Source:
        timm's `ModelEma`, as DeiT uses it (decay = 1 - momentum).

    Args:
        model: Model whose state is averaged; the average starts as a copy.
        momentum: Weight of the newest state, in (0, 1); 4e-5 is a decay of 0.99996.
        interval: Steps between two updates.
        device: Where the average is kept, or None for the model's device.

    Raises:
        ConfigError: The momentum is outside (0, 1).

    Differs from official:
        Integer state is copied, not averaged and cut off. MMEngine's own average forgets its start:
        it copies the model at the first step.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 4e-5,
        interval: int = 1,
        device: torch.device | None = None,
    ) -> None:
        if not 0.0 < momentum < 1.0:
            raise ConfigError(f"momentum={momentum} is outside (0, 1); 4e-5 is a decay of 0.99996")
        super().__init__(model, interval, device, update_buffers=True)
        self.momentum = momentum

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
        """Move one averaged tensor towards the source, in place.

        Args:
            averaged_param: Averaged tensor.
            source_param: Newest tensor.
            steps: Updates so far.
        """
        averaged_param.lerp_(source_param, self.momentum)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the newest state of the model.

        Args:
            model: The model that is trained.
        """
        self.steps += 1
        if self.interval > 1 and int(self.steps) % self.interval:
            return
        averaged, source = [], []
        newest = model.state_dict()
        for key, value in self.avg_parameters.items():
            if value.is_floating_point():
                averaged.append(value)
                source.append(newest[key].to(value.device))
            else:
                value.copy_(newest[key])
        if averaged:
            torch._foreach_lerp_(averaged, source, self.momentum)


@HOOKS.register_module()
class ModelEMAHook(EMAHook):
    """Keep a `ModelEMA` beside the model: it is evaluated, saved and resumed.

    Checkpoints hold the average as `state_dict` (ready for use) and the trained weights as
    `ema_state_dict`, as MMEngine's hook writes them.

    Args:
        momentum: Weight of the newest state, in (0, 1); 4e-5 is a decay of 0.99996.
        interval: Steps between two updates.
        begin_iter: Iteration at which averaging starts; before it the average is a copy.
        begin_epoch: The same as an epoch; only one of the two.
        strict_load: Refuse a checkpoint whose keys differ.

    Differs from official:
        There the average is saved but never evaluated, and resuming loses it.
    """

    def __init__(
        self,
        momentum: float = 4e-5,
        interval: int = 1,
        begin_iter: int = 0,
        begin_epoch: int = 0,
        strict_load: bool = False,
    ) -> None:
        super().__init__(
            ema_type="ModelEMA",
            strict_load=strict_load,
            begin_iter=begin_iter,
            begin_epoch=begin_epoch,
            momentum=momentum,
            interval=interval,
        )
