"""Operator schemas of the `patchreg` namespace and the search for their compiled kernels.

Schemas live in Python, so every operator exists without a compiled library: `reference.py` answers
on any device, and the kernels of a library take over on the devices it was built for.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

NAMESPACE = "patchreg"
MODES = ("auto", "reference", "require")
INSTALL_HINT = (
    "build it with `PATCHREG_BUILD_OPS=1 pip install --no-build-isolation .` "
    "(add `-e` for a development checkout)"
)

_GRID = "SymInt height, SymInt width, SymInt extra"
_POOL = f"Tensor x, Tensor rows, Tensor owner, {_GRID}, bool mean"
_UNPOOL = f"Tensor update, Tensor rows, Tensor owner, Tensor? reference, {_GRID}, bool mean"
_NORM = "Tensor weight, Tensor bias, float eps"
# `mean` divides by the number of real tokens of a row. The dense operators weigh a token by the
# gate of its region; without a gate they divide as well.
SCHEMAS = {
    "region_route": f"(Tensor logits, int[] splits, {_GRID}) -> (Tensor choice, Tensor lengths)",
    "region_lengths": f"(Tensor choice, int[] splits, {_GRID}) -> Tensor",
    "region_plan": (
        f"(Tensor choice, int[] splits, {_GRID}, SymInt total, bool padded)"
        " -> (Tensor rows, Tensor lengths, Tensor owner, Tensor starts)"
    ),
    "region_pool": f"({_POOL}) -> Tensor",
    "region_pool_out": f"({_POOL}, Tensor(a!) out) -> ()",
    "region_unpool": f"({_UNPOOL}) -> Tensor",
    "region_unpool_out": f"({_UNPOOL}, Tensor(a!) out) -> ()",
    "region_pool_dense": f"(Tensor x, Tensor? gate, int[] splits, {_GRID}) -> Tensor",
    "region_unpool_dense": (
        f"(Tensor update, Tensor? gate, Tensor? reference, int[] splits, {_GRID}) -> Tensor"
    ),
    "region_gate_dot": f"(Tensor x, Tensor update, int[] splits, {_GRID}) -> Tensor",
    "packed_attend": (
        "(Tensor query, Tensor key, Tensor value, Tensor starts, float scale) -> Tensor"
    ),
    "sum_norm": f"(Tensor x, Tensor update, {_NORM}) -> Tensor",
    "region_pool_norm": (
        f"(Tensor x, Tensor rows, Tensor owner, {_NORM}, {_GRID}) -> (Tensor pooled, Tensor normed)"
    ),
    "region_unpool_norm": (
        f"(Tensor first, Tensor second, Tensor owner, Tensor reference, {_NORM}, SymInt region,"
        f" {_GRID}) -> (Tensor out, Tensor normed, Tensor means)"
    ),
}

CPU_ONLY = {"packed_attend"}
"""Operators without a kernel of their own on a GPU, where the library has one for every use."""

library = torch.library.Library(NAMESPACE, "DEF")  # noqa: TOR901
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema)


def _read_mode() -> str:
    mode = os.environ.get("PATCHREG_OPS", "auto")
    if mode not in MODES:
        raise ValueError(
            f"PATCHREG_OPS={mode!r} is unknown; expected one of {', '.join(MODES)}. "
            "Unset the variable for the default, auto."
        )
    return mode


def _load(mode: str) -> tuple[Path | None, str | None]:
    """Loads the library beside this file; returns (path, None) or (None, why none is in use)."""
    if mode == "reference":
        return None, "switched off by PATCHREG_OPS=reference"
    folder = Path(__file__).parent
    found = sorted(path for pattern in ("_C*.so", "_C*.pyd") for path in folder.glob(pattern))
    if not found:
        error = f"no compiled library in {folder}"
    else:
        try:
            torch.ops.load_library(str(found[0]))
            return found[0], None
        except (
            OSError,
            RuntimeError,
        ) as failure:  # Typical cause: built for another torch version.
            error = f"{found[0].name} does not load with torch {torch.__version__}: {failure}"
    if mode == "require":
        raise ImportError(f"PATCHREG_OPS=require, but {error}; {INSTALL_HINT}.")
    return None, error


mode = _read_mode()
path, error = _load(mode)
# Device types of which nothing more needs to be said.
_warned: set[str] = set()


def has_kernels(device_type: str) -> bool:
    """True when compiled kernels answer for tensors of this device type ("cpu", "cuda")."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return (
        key is not None
        and path is not None
        and all(
            torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
            for name in SCHEMAS
            if device_type == "cpu" or name not in CPU_ONLY
        )
    )


def build_info() -> dict[str, str | bool | None]:
    """Tells which implementation of the operators runs in this process.

    Returns:
        `mode`: value of PATCHREG_OPS in force; `cpu`, `cuda`: whether compiled kernels answer on
        that device; `library`: path of the loaded library or None; `error`: why no library is in
        use, or None; `torch`: version of the running torch.
    """
    return {
        "mode": mode,
        "cpu": has_kernels("cpu"),
        "cuda": has_kernels("cuda"),
        "library": None if path is None else str(path),
        "error": error,
        "torch": str(torch.__version__),
    }


def note_device(device_type: str) -> None:
    """Warns once per device type when the slow path runs although nobody asked for it."""
    if mode == "reference" or device_type in _warned or device_type not in ("cpu", "cuda"):
        return
    if has_kernels(device_type):
        _warned.add(device_type)
        return
    reason = error or f"{path} was built without {device_type.upper()} kernels"
    if mode == "require":
        raise RuntimeError(f"PATCHREG_OPS=require, but {reason}; {INSTALL_HINT}.")
    _warned.add(device_type)
    warnings.warn(
        f"patchreg_ops runs its slow reference path on {device_type}: {reason}; {INSTALL_HINT}, "
        "or set PATCHREG_OPS=reference to accept it.",
        RuntimeWarning,
        stacklevel=3,
    )
