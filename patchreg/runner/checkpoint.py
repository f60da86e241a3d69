"""What a checkpoint holds, and how it goes into a model."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.logging import HistoryBuffer, MessageHub
from torch import Tensor, nn

from patchreg.runner.sharding import is_sharded, like, shard_state
from patchreg.utils.errors import CheckpointError
from patchreg.utils.weights import load_file, state_dict_of

_SHOWN = 4
_SEAL = b"patchreg sha256 "
_SEAL_SIZE = len(_SEAL) + 64


def _digest(path: str | os.PathLike[str], size: int) -> bytes:
    """Return the SHA-256 of the first bytes of a file, in hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            found.update(block)
            size -= len(block)
    return found.hexdigest().encode()


def seal(path: str | os.PathLike[str]) -> None:
    """Add a checksum to a file of `torch.save`, as the comment of the zip archive that it is.

    There the checksum stays with the file when it is copied or renamed, and readers of zip files, torch among
    them, pass over it.

    Args:
        path: File to seal, once.
    """
    # The last two bytes of an archive without a comment are the comment's length.
    size = os.path.getsize(path) - 2
    comment = _SEAL + _digest(path, size)
    with open(path, "r+b") as file:
        file.seek(size)
        file.write(len(comment).to_bytes(2, "little") + comment)


def check_file(path: str | os.PathLike[str], required: bool = False) -> None:
    """Check that a checkpoint is what was written: by its checksum, else by those that every zip file has.

    torch itself does not notice a flipped bit in a tensor.

    Args:
        path: File to check; one that is missing or in another format passes, its reader has to judge.
        required: Whether other formats are refused too.

    Raises:
        CheckpointError: The file is damaged.
    """
    if not os.path.isfile(path):
        return
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(2)
        file.seek(max(size - _SEAL_SIZE, 0))
        end = file.read()
    if not start:
        raise CheckpointError(f"checkpoint '{path}' is empty")
    if start != b"PK":
        if required:
            raise CheckpointError(
                f"checkpoint '{path}' is damaged: it does not begin as torch's files do"
            )
        return
    if end.startswith(_SEAL):
        if _digest(path, size - _SEAL_SIZE - 2) != end[len(_SEAL) :]:
            raise CheckpointError(
                f"checkpoint '{path}' is damaged: its content does not fit its checksum"
            )
        return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint '{path}' is damaged or truncated: {error}") from error
    if broken:
        raise CheckpointError(
            f"checkpoint '{path}' is damaged: {broken} in it does not fit its checksum"
        )


def open_gradients(model: nn.Module, optim_wrapper: Any) -> dict[str, Tensor]:
    """Return the gradients of an optimisation step that is half accumulated, as a mean over processes.

    Args:
        model: The model, not wrapped.
        optim_wrapper: Its optimiser wrapper.
    """
    parts = getattr(optim_wrapper, "_accumulative_counts", 1)
    if parts == 1 or optim_wrapper._inner_count % parts == 0:
        return {}
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.detach().clone()
            if hasattr(gradient, "full_tensor"):
                gradient = gradient.full_tensor()  # sharded gradients are means already
            elif get_world_size() > 1:
                all_reduce(gradient, "mean")
            found[name] = gradient.cpu()
    return found


def restore_gradients(model: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """Put the gradients of a half accumulated step back.

    Args:
        model: The model, not wrapped.
        gradients: What `open_gradients` returned.
    """
    for name, parameter in model.named_parameters():
        if name in gradients:
            gradient = gradients[name].to(parameter.device, parameter.dtype)
            parameter.grad = like(gradient, parameter)


def plain_message_hub(state: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the state of a message hub into tensors and plain values.

    MMEngine stores its HistoryBuffer objects, which a weights-only load refuses.

    Args:
        state: `MessageHub.state_dict()`.
    """
    scalars = {}
    for key, buffer in state["log_scalars"].items():
        values, counts = buffer.data
        scalars[key] = {
            "values": torch.from_numpy(np.asarray(values, dtype=np.float64).copy()),
            "counts": torch.from_numpy(np.asarray(counts, dtype=np.int64).copy()),
            "max_length": int(buffer.max_length),
        }
    return {
        "log_scalars": scalars,
        "runtime_info": {
            key: value for key, value in state["runtime_info"].items() if _is_plain(value)
        },
        "resumed_keys": {key: bool(value) for key, value in state["resumed_keys"].items()},
    }


def plain(value: Any) -> Any:
    """Replace NumPy scalars and arrays, at any depth, by Python values and tensors, and leave out functions.

    MMEngine's one-cycle schedule counts a bound method as its state.

    Args:
        value: Part of a checkpoint.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {
            plain(key): plain(item)
            for key, item in value.items()
            if not isinstance(item, (FunctionType, MethodType))
        }
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return value


def restore_message_hub(hub: MessageHub, state: Mapping[str, Any]) -> None:
    """Put a plain state back into a message hub.

    Args:
        hub: The hub of the run.
        state: What `plain_message_hub` returned.
    """
    scalars = OrderedDict(
        (
            key,
            HistoryBuffer(
                log_history=item["values"].tolist(),
                count_history=item["counts"].tolist(),
                max_length=item["max_length"],
            ),
        )
        for key, item in state["log_scalars"].items()
    )
    hub.load_state_dict(
        {
            "log_scalars": scalars,
            "runtime_info": OrderedDict(state["runtime_info"]),
            "resumed_keys": OrderedDict(state["resumed_keys"]),
        }
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, Tensor, np.generic))


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def check_state(
    model: nn.Module, state: Mapping[str, Tensor], source: str, strict: bool
) -> tuple[list[str], list[str]]:
    """Check that weights belong to a model.

    Args:
        model: The model, not wrapped.
        state: Flat state dict.
        source: Where it came from, for messages.
        strict: Whether every key must match; otherwise missing and unexpected keys are fine, but a shape that
            differs, or no common key at all, is still an error.

    Returns:
        Missing and unexpected keys.

    Raises:
        CheckpointError: The weights belong to another model.
    """
    own = model.state_dict()
    scalars = getattr(model, "sharded_scalars", ())
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, the model's is {tuple(own[key].shape)}"
        for key in own
        if key in state and key not in scalars and state[key].shape != own[key].shape
    ]
    common = len(own) - len(missing)
    if shapes or common == 0 or (strict and (missing or unexpected)):
        parts = []
        if shapes:
            parts.append(f"other shapes: {_list(shapes)}")
        if missing:
            parts.append(f"missing: {_list(missing)}")
        if unexpected:
            parts.append(f"not in the model: {_list(unexpected)}")
        raise CheckpointError(
            f"checkpoint '{source}' does not belong to this model ({common} of {len(own)} keys match; "
            + "; ".join(parts)
            + "). Use the config it was trained with (kept beside it in the work dir), or convert it with "
            "tools/convert.py"
        )
    return missing, unexpected


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    strict: bool,
    logger: logging.Logger | None = None,
) -> None:
    """Load weights into a model; all or nothing.

    Args:
        model: The model, not wrapped.
        state: Flat state dict.
        source: Where it came from, for messages.
        strict: As in `check_state`.
        logger: Where a partial match is reported.

    Raises:
        CheckpointError: The weights belong to another model; nothing was changed.
    """
    missing, unexpected = check_state(model, state, source, strict)
    if is_sharded(model):
        state = shard_state(model, state)
    model.load_state_dict(state, strict=False)
    if logger is not None and (missing or unexpected):
        logger.warning(
            "loaded %d of %d keys from %s; missing: %s; not used: %s",
            len(model.state_dict()) - len(missing),
            len(model.state_dict()),
            source,
            _list(missing) or "none",
            _list(unexpected) or "none",
        )


def parts_to_load(
    model: nn.Module, missing_ok: bool = False
) -> Iterator[tuple[nn.Module, str, dict[str, Tensor]]]:
    """Yield the parts of a model that name weights by `init_cfg`, with the file and its weights.

    Args:
        model: The model, not wrapped.
        missing_ok: Pass over files that do not exist, which an earlier stage is to write.

    Raises:
        MissingFileError: A file does not exist.
        CheckpointError: A file is damaged.
    """
    for module in model.modules():
        config = getattr(module, "init_cfg", None)
        if not isinstance(config, Mapping) or config.get("type") != "Pretrained":
            continue
        path = config["checkpoint"]
        if missing_ok and not os.path.isfile(path):
            continue
        check_file(path)
        state = state_dict_of(load_file(path), path)
        prefix = config.get("prefix") or ""
        prefix += "." if prefix and not prefix.endswith(".") else ""
        yield (
            module,
            path,
            {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)},
        )


def load_parts(
    model: nn.Module, logger: logging.Logger | None = None, strict: bool = False
) -> None:
    """Load the weights that parts of a model name themselves.

    MMEngine does so before a training only, and passes over weights that do not fit.

    Args:
        model: The model, not wrapped.
        logger: Where a partial match is reported.
        strict: Refuse files that lack a weight of their part; a training may start from such.

    Raises:
        MissingFileError: A file does not exist.
        CheckpointError: A file is damaged or belongs to another model.
    """
    for module, path, state in parts_to_load(model):
        load_state(module, state, path, strict=strict, logger=logger)
