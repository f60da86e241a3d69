"""Fully sharded training: each process keeps a part of every parameter, gradient and optimiser state.

Checkpoints are those of an unsharded run: whole tensors on the CPU, written by the first process, so that a run
may be resumed, evaluated or fine-tuned in any other form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import get_world_size, is_main_process
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchreg.registry import MODEL_WRAPPERS
from patchreg.utils.errors import ConfigError, did_you_mean

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

SHARDS_ON_CPUS = hasattr(torch.cpu.current_stream(), "record_event")
"""Whether this torch has what `fully_shard` asks of a device's streams on CPUs too: from 2.7 on."""


def child_lists(
    model: nn.Module, names: Sequence[str] | str, key: str
) -> list[tuple[str, nn.Module]]:
    """Return the modules of some lists of a model, such as the blocks of a transformer.

    Args:
        model: The model, not wrapped.
        names: Dotted names of module lists, or of single modules.
        key: What the names were given as, for messages.

    Raises:
        ConfigError: The model has no such part.
    """
    names = [names] if isinstance(names, str) else names
    found = []
    known = dict(model.named_modules())
    for name in names:
        part = known.get(name)
        if part is None:
            lists = [item for item, module in known.items() if isinstance(module, nn.ModuleList)]
            raise ConfigError(
                f"{key}: the model has no part '{name}'.{did_you_mean(name, known)} Its lists of blocks are: "
                f"{', '.join(lists) or 'none'}"
            )
        if isinstance(part, (nn.ModuleList, nn.Sequential)):
            found += [(f"{name}.{index}", child) for index, child in part.named_children()]
        else:
            found.append((name, part))
    return found


@MODEL_WRAPPERS.register_module()
class FullyShardedWrapper:
    """Shard a model over all processes with torch's `fully_shard`; the model itself comes back.

    Set as `model_wrapper_cfg`. Each block is one unit of communication, and what is left is another.

    Source:
        PyTorch FSDP2 (`torch.distributed.fsdp.fully_shard`), Zhao et al. 2023, arXiv 2304.11277.

    Args:
        module: The model.
        blocks: Dotted names of its lists of blocks.
        dtype: Type of the parameters in forward and backward, `bfloat16`, `float16` or `float32`; None for the
            model's own. Gradients are summed in float32.
        reshard_after_forward: Whether blocks are let go between forward and backward: less memory, one more
            gathering.

    Raises:
        ConfigError: The run has one process only, torch is too old (on CPUs before 2.7), or a name or type is
            unknown.
    """

    def __new__(  # type: ignore[misc]
        cls,
        module: nn.Module,
        blocks: Sequence[str] = ("backbone.blocks",),
        dtype: str | None = None,
        reshard_after_forward: bool = True,
    ) -> nn.Module:
        try:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        except ImportError as error:
            raise ConfigError(
                f"model_wrapper_cfg.type 'FullyShardedWrapper' does not work with torch {torch.__version__}: "
                f"{error}; leave it out to train data parallel"
            ) from error
        if get_device() == "cpu" and not SHARDS_ON_CPUS:
            raise ConfigError(
                f"torch {torch.__version__} shards models on GPUs only: on CPUs it takes torch >= 2.7. Leave "
                "out model_wrapper_cfg to train data parallel"
            )
        if dtype is not None and dtype not in _DTYPES:
            raise ConfigError(
                f"model_wrapper_cfg.dtype '{dtype}': expected one of {', '.join(_DTYPES)}"
            )
        module.sharded_scalars = _spread_scalars(module)  # type: ignore[assignment]
        units = child_lists(module, blocks, "model_wrapper_cfg.blocks")
        options: dict[str, Any] = dict(
            mesh=init_device_mesh(get_device(), (get_world_size(),)),
            reshard_after_forward=reshard_after_forward,
        )
        if dtype is not None:
            options["mp_policy"] = MixedPrecisionPolicy(_DTYPES[dtype], torch.float32)
        for _, unit in units:
            fully_shard(unit, **options)
        fully_shard(module, **options)
        return module


def _spread_scalars(model: nn.Module) -> frozenset[str]:
    """Make parameters without dimensions, which torch cannot shard, 1 x 1 matrices; return their names.

    Two dimensions, because weight decay leaves out vectors. Checkpoints hold them as they were.
    """
    found = [name for name, value in model.named_parameters() if value.ndim == 0]
    for name in found:
        owner, _, own = name.rpartition(".")
        part = model.get_submodule(owner)
        value = getattr(part, own)
        setattr(part, own, nn.Parameter(value.detach().reshape(1, 1), value.requires_grad))
    return frozenset(found)


class _Recomputed:
    """Put before a module's class: its inner activations are not kept but computed again."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module without keeping what its backward pass needs."""
        inner = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        return checkpoint(inner, *args, use_reentrant=False, **kwargs)


def recompute(model: nn.Module, names: Sequence[str] | str) -> None:
    """Save memory: let parts of a model compute their activations again in the backward pass.

    Args:
        model: The model, not wrapped.
        names: Dotted names of lists of blocks, or of single parts.

    Raises:
        ConfigError: The model has no such part.
    """
    for _, part in child_lists(model, names, "activation_checkpointing"):
        kind = type(part)
        part.__class__ = type(kind.__name__, (_Recomputed, kind), {})


def is_sharded(model: nn.Module) -> bool:
    """Whether a model was sharded.

    Args:
        model: The model.
    """
    return any(_is_part(value) for value in model.parameters())


def _is_part(value: Any) -> bool:
    return hasattr(value, "full_tensor") and hasattr(value, "placements")


def whole(tree: Any) -> Any:
    """Gather every sharded tensor in nested dicts and lists; to be called on all processes.

    Args:
        tree: Dicts, lists, tensors and plain values.

    Returns:
        The same on the CPU, on the first process; on the others tensors become None.
    """
    if isinstance(tree, Mapping):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(whole(value) for value in tree)
    if not isinstance(tree, Tensor):
        return tree
    value = tree.full_tensor() if _is_part(tree) else tree  # type: ignore[attr-defined]
    return value.detach().cpu().clone() if is_main_process() else None


def whole_model(model: nn.Module) -> dict[str, Any]:
    """Gather the state dict of a sharded model; to be called on all processes.

    Args:
        model: The sharded model.

    Returns:
        The state of the model as it was before, see `whole`.
    """
    scalars = getattr(model, "sharded_scalars", ())
    return {
        key: value.reshape(()) if key in scalars and value is not None else value
        for key, value in whole(model.state_dict()).items()
    }


def whole_optimizer(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Gather the state of the optimiser of a sharded model; to be called on all processes.

    Args:
        model: The sharded model.
        optimizer: Its optimiser, or optimiser wrapper.

    Returns:
        The state for the model as it was before, see `whole`.
    """
    state = whole(optimizer.state_dict())
    scalars = getattr(model, "sharded_scalars", ())
    meant = {id(value) for name, value in model.named_parameters() if name in scalars}
    parameters = [item for group in optimizer.param_groups for item in group["params"]]
    for index, values in state["state"].items():
        if id(parameters[int(index)]) in meant:
            for key, value in values.items():
                values[key] = value.reshape(()) if isinstance(value, Tensor) else value
    return state


def like(value: Tensor, model: Any) -> Tensor:
    """Return this process's part of a whole tensor.

    Args:
        value: The whole tensor, the same on all processes.
        model: Tensor that it is going to replace.
    """
    value = value.reshape(model.shape)
    if not _is_part(model):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(device=model.device)
    return distribute_tensor(value, model.device_mesh, model.placements)


def shard_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict whose tensors are sharded as those of the model.

    Args:
        model: The sharded model.
        state: Flat state dict of whole tensors.
    """
    mine = model.state_dict()
    return {key: like(value, mine[key]) if key in mine else value for key, value in state.items()}


def shard_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an optimiser with its tensors sharded as the parameters they belong to.

    Args:
        optimizer: Optimiser of the sharded parameters.
        state: What `state_dict` of an optimiser of whole parameters returns.
    """
    parameters = [item for group in optimizer.param_groups for item in group["params"]]
    sharded = {}
    for index, values in state["state"].items():
        parameter = parameters[int(index)]
        sharded[index] = {
            key: like(value, parameter)
            if isinstance(value, Tensor) and key != "step" and value.numel() == parameter.numel()
            else value
            for key, value in values.items()
        }
    return {**state, "state": sharded}
