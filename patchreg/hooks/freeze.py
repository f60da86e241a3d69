"""Layers that are not stepped in the first epochs."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import nn

from patchreg.registry import HOOKS
from patchreg.utils.errors import ConfigError


@HOOKS.register_module()
class FreezeLastLayerHook(Hook):
    """Take the gradients of some layers away before the step of the optimiser, in the first epochs.

    The layers take part in forward, backward and gradient clipping, so data parallel training sees no
    unused parameters; the optimiser neither moves nor decays them and keeps no state for them.

    Source:
        `cancel_gradients_last_layer` of the official DINO.

    Args:
        epochs: Number of first epochs, at least 0.
        name: Parameters with this in their name are meant.

    Raises:
        ConfigError: `epochs` is negative; when training begins, no parameter has the name.
    """

    def __init__(self, epochs: int = 1, name: str = "last_layer") -> None:
        if epochs < 0:
            raise ConfigError(f"FreezeLastLayerHook: epochs={epochs}: expected at least 0")
        self.epochs = epochs
        self.name = name

    def before_train(self, runner: Any) -> None:
        """Find the parameters and stand in front of every step.

        Args:
            runner: The runner of the training.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        frozen: list[nn.Parameter] = [
            value for name, value in model.named_parameters() if self.name in name
        ]
        if not frozen:
            raise ConfigError(
                f"FreezeLastLayerHook: no parameter has '{self.name}' in its name; correct `name` or remove "
                "the hook"
            )

        def take_away(*_: Any) -> None:
            if runner.epoch < self.epochs:
                for parameter in frozen:
                    parameter.grad = None

        self._handle = runner.optim_wrapper.optimizer.register_step_pre_hook(take_away)

    def after_train(self, runner: Any) -> None:
        """Leave the optimiser alone again.

        Args:
            runner: The runner of the training.
        """
        self._handle.remove()
