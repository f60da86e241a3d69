"""Optimiser wrappers: mixed precision on every device, parameter groups without repetition."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce
from mmengine.logging import MMLogger, print_log
from mmengine.optim import AmpOptimWrapper as _AmpOptimWrapper
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.optim import OptimWrapper as _OptimWrapper
from torch import Tensor, nn

from patchreg.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from patchreg.utils.errors import ConfigError


@torch.no_grad()
def clip_each_gradient(parameters: Sequence[Tensor], max_norm: float) -> None:
    """Scale the gradient of every tensor by itself: by max_norm / (norm + 1e-6) where that is below 1.

    The norm of a sharded gradient is that of the whole one.

    Source:
        `clip_gradients` of the official DINO.

    Args:
        parameters: Parameters with gradients, which are changed in place.
        max_norm: Bound of the norm of each.
    """
    gradients = [item.grad for item in parameters if item.grad is not None]
    sharded = any(hasattr(item, "to_local") for item in gradients)
    if sharded:
        gradients = [item.to_local() for item in gradients]  # type: ignore[attr-defined]
    scales = torch._foreach_norm(gradients)
    if sharded:
        squares = torch.stack(list(scales)).square()
        all_reduce(squares)
        scales = tuple(squares.sqrt().unbind())
    torch._foreach_add_(scales, 1e-6)
    torch._foreach_reciprocal_(scales)
    torch._foreach_mul_(scales, max_norm)
    torch._foreach_clamp_max_(scales, 1.0)
    torch._foreach_mul_(gradients, scales)


@OPTIM_WRAPPERS.register_module()
class OptimWrapper(_OptimWrapper):
    """MMEngine's wrapper, with `clip_grad=dict(type='per_tensor', max_norm=3.0)` beside its own kinds.

    Args:
        optimizer: The optimiser.
        accumulative_counts: Iterations per step.
        clip_grad: As for MMEngine (`norm`, `value`), or `per_tensor`, see `clip_each_gradient`.

    Raises:
        ConfigError: `per_tensor` without a positive `max_norm`, or with anything else.
    """

    def __init__(
        self, optimizer: Any, accumulative_counts: int = 1, clip_grad: dict | None = None
    ) -> None:
        per_tensor = clip_grad is not None and clip_grad.get("type") == "per_tensor"
        if per_tensor:
            assert clip_grad is not None
            bounds = {key: value for key, value in clip_grad.items() if key != "type"}
            if set(bounds) != {"max_norm"} or not bounds["max_norm"] > 0:
                raise ConfigError(
                    f"clip_grad of type 'per_tensor' got {bounds}; expected max_norm above 0 and nothing "
                    "else, or clip_grad=None for no clipping"
                )
            clip_grad = dict(type="norm", **bounds)
        _OptimWrapper.__init__(self, optimizer, accumulative_counts, clip_grad)
        if per_tensor:
            self.clip_func = clip_each_gradient


@OPTIM_WRAPPERS.register_module()
class AmpOptimWrapper(OptimWrapper, _AmpOptimWrapper):
    """Mixed precision: bfloat16 wherever the device has it, float16 with loss scaling on request.

    Args:
        loss_scale: `dynamic` or a fixed scale; used by float16 only.
        dtype: `bfloat16`, `float16`, or None for bfloat16 on CPU and on GPUs that have it, else float16.
        kwargs: As for `OptimWrapper`.

    Raises:
        ConfigError: The type is unknown, or is float16 on a CPU.

    Differs from official:
        MMEngine's wrapper refuses to work without a GPU.
    """

    def __init__(
        self, loss_scale: str | float = "dynamic", dtype: str | None = None, **kwargs: Any
    ) -> None:
        OptimWrapper.__init__(self, **kwargs)
        device = get_device()
        if dtype is None:
            has_bfloat16 = device != "cuda" or torch.cuda.is_bf16_supported()
            dtype = "bfloat16" if has_bfloat16 else "float16"
        if dtype not in ("bfloat16", "float16"):
            raise ConfigError(f"optim_wrapper.dtype '{dtype}': expected 'bfloat16' or 'float16'")
        if dtype == "float16" and device == "cpu":
            raise ConfigError("optim_wrapper.dtype 'float16' needs a GPU; use 'bfloat16' on a CPU")
        self.cast_dtype = getattr(torch, dtype)
        scaling: dict[str, Any] = {}
        self._scale_update_param = None
        if loss_scale != "dynamic":
            self._scale_update_param = float(loss_scale)
            scaling["init_scale"] = float(loss_scale)
        self.loss_scaler = torch.amp.GradScaler(device, enabled=dtype == "float16", **scaling)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """The default constructor, with equal parameter groups merged.

    MMEngine makes one group per parameter, which turns the fused and foreach optimisers into loops.

    Args:
        optim_wrapper_cfg: Config of the optimiser wrapper.
        paramwise_cfg: As for MMEngine's default constructor (`norm_decay_mult`, `bias_decay_mult`,
            `flat_decay_mult`, `custom_keys`, ...).
    """

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = "", is_dcn_module: Any = None
    ) -> None:
        """Collect the parameters of a module into groups.

        Args:
            params: List that receives the groups.
            module: The module.
            prefix: Name of the module within the model; empty for the model itself.
            is_dcn_module: As in the parent.
        """
        if prefix:
            super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)
            return
        # The parent logs a line for every parameter, and warns of every frozen one; the groups below say
        # what is trained.
        logger = MMLogger.get_current_instance()
        level = logger.level
        logger.setLevel(logging.ERROR)
        without = self.base_wd == 0
        if without:
            # Parameters with and without weight decay differ all the same: a schedule may raise it.
            self.base_wd = 1.0
        try:
            super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)
        finally:
            logger.setLevel(level)
            if without:
                self.base_wd = 0.0
        if without:
            for group in params:
                group["decays"] = group.get("weight_decay", 1.0) != 0
                group["weight_decay"] = 0.0
        merged: dict[tuple, dict] = {}
        for group in params:
            key = tuple(
                sorted((name, repr(value)) for name, value in group.items() if name != "params")
            )
            if key in merged:
                merged[key]["params"] += group["params"]
            else:
                merged[key] = group
        params[:] = merged.values()
        for group in params:
            settings = {key: value for key, value in group.items() if key != "params"}
            shown = ", ".join(f"{key} {value}" for key, value in settings.items()) or "as given"
            print_log(f"parameter group: {len(group['params'])} tensors, {shown}", logger="current")
