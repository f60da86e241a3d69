"""Converters of weights that belong to no method; each module is a name of `tools/convert.py`.

A module offers what the `convert` module of a method does (see `patchreg.runner.convert`), and
`read(path)` when its files are not torch's. Underscores of its name become dashes.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def shared_converters() -> dict[str, ModuleType]:
    """Return the converters here, by the name that the tool knows them by."""
    return {
        item.name.replace("_", "-"): importlib.import_module(f"{__name__}.{item.name}")
        for item in pkgutil.iter_modules(__path__)
        if not item.name.startswith("_")
    }
