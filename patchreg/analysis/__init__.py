"""Analyses of finished and running trainings: what `tools/analyze.py` does.

A module here that offers `HELP` (one line), `add_arguments(parser)` and `run(arguments) -> str`, which
returns what to print, is a name of the tool.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def analyses() -> dict[str, ModuleType]:
    """Return the module of each analysis, by name."""
    found = {
        item.name: importlib.import_module(f"{__name__}.{item.name}")
        for item in pkgutil.iter_modules(__path__)
    }
    return {name: module for name, module in sorted(found.items()) if hasattr(module, "HELP")}
