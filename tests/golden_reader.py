"""Reads golden tensors and remembers which were read, so that unread ones can be reported.

The compact set beside this file is the default; the environment variable PATCHREG_GOLDEN names the
folder of a fuller one with the same layout (`<method>/<file>.safetensors`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import PIL
from safetensors import safe_open
from torch import Tensor

SUFFIX = ".safetensors"
OLD_PILLOW = int(PIL.__version__.split(".")[0]) < 13
"""The reference pictures were resized by Pillow 13, which takes the cheaper of its two passes first. Older
releases take the horizontal one first. Where the order differs so do pixels, by a grey level; by more where
bicubic weights overshoot, because the first pass clips."""
_read: dict[tuple[str, str], set[str]] = {}


def folder(method: str) -> Path:
    """Folder of a method's golden files in the set in use."""
    root = os.environ.get("PATCHREG_GOLDEN")
    return (Path(root) if root else Path(__file__).parent / "golden") / method


class GoldenFile(Mapping[str, Tensor]):
    """Tensors of one golden file by name, read on access; an access counts as a check.

    Args:
        method: method key, the sub-folder.
        name: file name without suffix.

    Raises:
        FileNotFoundError: when the set in use has no such file.
    """

    def __init__(self, method: str, name: str) -> None:
        self.path = folder(method) / (name + SUFFIX)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"no golden file {self.path}; expected {name}{SUFFIX} of method {method}. "
                "Unset PATCHREG_GOLDEN to use the set of the checkout."
            )
        self._reads = _read.setdefault((method, name), set())
        with safe_open(self.path, framework="pt") as file:
            self._names = sorted(file.keys())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._names:
            raise KeyError(f"{key} is not in {self.path.name}")
        self._reads.add(key)
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All tensors below `prefix/`, named without it; counts as reading them."""
        start = prefix.rstrip("/") + "/"
        return {name[len(start) :]: self[name] for name in self._names if name.startswith(start)}


@cache
def _open(method: str, name: str, root: str | None) -> GoldenFile:
    return GoldenFile(method, name)


def load(method: str, name: str) -> GoldenFile:
    """Golden file `name` (with or without suffix) of a method."""
    return _open(method, name.removesuffix(SUFFIX), os.environ.get("PATCHREG_GOLDEN"))


def unread(method: str, name: str) -> list[str]:
    """Names of the file's tensors that nothing in this process has read."""
    name = name.removesuffix(SUFFIX)
    return sorted(set(load(method, name)) - _read.get((method, name), set()))
