"""Reading weight files safely."""

from __future__ import annotations

import os
import pickle
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchreg.utils.errors import CheckpointError, MissingFileError
from patchreg.utils.public_weights import advice_for

_CONTAINERS = ("state_dict", "model", "state_dict_ema", "model_state_dict", "net")


def maker_of(path: str | os.PathLike[str]) -> str | None:
    """Return the config that writes a checkpoint under `work_dirs/`, if the path tells.

    Args:
        path: Path of a checkpoint that is missing.
    """
    parts = Path(path).parts
    if "work_dirs" not in parts:
        return None
    tail = parts[parts.index("work_dirs") + 1 : -1]
    for stop in range(len(tail), 0, -1):
        config = Path("configs", *tail[:stop]).with_suffix(".py")
        if config.is_file():
            return str(config)
    return None


def how_to_get(path: str | os.PathLike[str]) -> str:
    """Say what to do about a weight file that does not exist.

    Args:
        path: Path of the file, or name of public weights.
    """
    maker = maker_of(path)
    if maker:
        return f"make it with: python tools/train.py {maker}"
    return advice_for(os.fspath(path)) or "check the path"


def load_file(
    path: str | os.PathLike[str], map_location: Any = "cpu", allowed: Sequence[type] = ()
) -> dict[str, Any]:
    """Read a checkpoint file without running any code from it.

    `.safetensors` files are read as such; everything else goes through torch's weights-only
    unpickler.

    Args:
        path: File to read.
        map_location: Where tensors go, as in `torch.load`.
        allowed: Classes of plain values that the file may hold too, such as `argparse.Namespace`.

    Raises:
        MissingFileError: The file does not exist; names the config that makes it when the path
            tells.
        CheckpointError: The file is damaged, is no checkpoint, or holds pickled objects.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        kind = "is a folder" if os.path.isdir(path) else "does not exist"
        raise MissingFileError(f"checkpoint '{path}' {kind}; {how_to_get(path)}")
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file as read

        try:
            return read(path, device=str(map_location))
        except (SafetensorError, ValueError, OSError) as error:
            raise CheckpointError(
                f"'{path}' is not a readable safetensors file ({error}); it may be truncated: "
                "fetch or save it again"
            ) from error
    try:
        with torch.serialization.safe_globals(list(allowed)):
            loaded = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n", 1)[0]
        if "Unsupported" in reason or "WeightsUnpickler" in str(error) or "GLOBAL" in str(error):
            name = re.search(r"GLOBAL (\S+)", str(error))
            raise CheckpointError(
                f"'{path}' is a pickle that holds more than tensors and plain values"
                + (f" ({name[1]})" if name else "")
                + ", and is not loaded because unpickling can run code; save only its state dict "
                "on a machine that trusts it, or use tools/convert.py for the layouts it knows"
            ) from error
        raise CheckpointError(
            f"'{path}' is not a checkpoint or is damaged ({reason}); expected a file written by "
            "torch.save or a .safetensors file"
        ) from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        AttributeError,
        struct.error,
    ) as error:
        reason = str(error).split("\n", 1)[0] or "it ends too early"
        raise CheckpointError(
            f"'{path}' cannot be read as a checkpoint ({reason}); it is truncated or was not "
            "written by torch.save: fetch or save it again"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"'{path}' holds a {type(loaded).__name__}; expected a dict of tensors or a checkpoint "
            "dict with the key 'state_dict' or 'model'"
        )
    return loaded


def load_weights(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Tensor]:
    """Read the flat state dict of a weight file, whatever the container around it.

    Args:
        path: File to read.
        map_location: Where tensors go, as in `torch.load`.

    Raises:
        MissingFileError: The file does not exist.
        CheckpointError: No dict of tensors is inside.
    """
    return state_dict_of(load_file(path, map_location), path)


def container_of(loaded: dict[str, Any]) -> str | None:
    """Return the key that holds the state dict, or None if the weights lie on the top level.

    Args:
        loaded: What `load_file` returned.
    """
    return next((key for key in _CONTAINERS if isinstance(loaded.get(key), dict)), None)


def state_dict_of(loaded: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Take the flat state dict out of a loaded file.

    A `module.` prefix of data parallel is removed.

    Args:
        loaded: What `load_file` returned.
        path: Where it came from, for the message.

    Raises:
        CheckpointError: No dict of tensors is inside.
    """
    container = container_of(loaded)
    state = loaded if container is None else loaded[container]
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(repr(key) for key in list(loaded)[:6])
        raise CheckpointError(
            f"'{os.fspath(path)}' holds no weights (its keys: {keys}); expected a state dict, "
            "alone or under one of " + ", ".join(repr(key) for key in _CONTAINERS)
        )
    if all(key.startswith("module.") for key in tensors):
        tensors = {key[len("module.") :]: value for key, value in tensors.items()}
    return tensors
