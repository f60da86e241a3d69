"""Layer-wise adaptive rate scaling."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from patchreg.registry import OPTIMIZERS
from patchreg.utils.errors import ConfigError


@OPTIMIZERS.register_module()
class LARS(Optimizer):
    """SGD with momentum whose step is scaled by |p| / |g| for every tensor that is not one-dimensional.

    g <- g + decay p; g <- g eta |p| / |g| (factor 1 where a norm is 0); m <- momentum m + g;
    p <- p - lr m. One-dimensional tensors get neither decay nor scaling.

    Source:
        `LARS` of the official DINO, after "Large Batch Training of Convolutional Networks".

    Args:
        params: Parameters or groups.
        lr: Learning rate, at least 0.
        weight_decay: Decay, at least 0.
        momentum: In [0, 1).
        eta: Trust coefficient, above 0.

    Raises:
        ConfigError: A value is out of its range.

    Differs from official:
        The two filter arguments, which are ignored there, do not exist.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1 or eta <= 0:
            raise ConfigError(
                f"LARS(lr={lr}, weight_decay={weight_decay}, momentum={momentum}, eta={eta}): expected lr "
                "and weight_decay >= 0, momentum in [0, 1), eta > 0"
            )
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change the parameters by one step.

        Args:
            closure: Computes the loss anew, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if parameter.ndim != 1:
                    gradient = gradient.add(parameter, alpha=group["weight_decay"])
                    own, other = parameter.norm(), gradient.norm()
                    scale = torch.where((own > 0) & (other > 0), group["eta"] * own / other, 1.0)
                    gradient = gradient * scale
                state = self.state[parameter]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(parameter)
                state["mu"].mul_(group["momentum"]).add_(gradient)
                parameter.add_(state["mu"], alpha=-group["lr"])
        return loss
