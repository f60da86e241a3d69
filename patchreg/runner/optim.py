"""Optimiser wrappers: mixed precision on every device, parameter groups without repetition."""

from __future__ import annotations

import logging
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.logging import MMLogger, print_log
from mmengine.optim import AmpOptimWrapper as _AmpOptimWrapper
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from patchreg.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from patchreg.utils.errors import ConfigError


@OPTIM_WRAPPERS.register_module()
class AmpOptimWrapper(_AmpOptimWrapper):
    """Mixed precision: bfloat16 wherever the device has it, float16 with loss scaling on request.

    Args:
        loss_scale: `dynamic` or a fixed scale; used by float16 only.
        dtype: `bfloat16`, `float16`, or None for bfloat16 on CPU and on GPUs that have it, else float16.
        kwargs: As for `mmengine.optim.OptimWrapper`.

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
        # The parent logs a line for every parameter; the groups below say the same.
        logger = MMLogger.get_current_instance()
        level = logger.level
        logger.setLevel(logging.WARNING)
        try:
            super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)
        finally:
            logger.setLevel(level)
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
