"""Fetching, checking and converting data sets and weights; what `tools/prepare_data.py` calls.

Files are checked against pinned checksums, written under a temporary name and renamed. Nothing that
exists is overwritten or moved.

Every module here whose name has no leading underscore offers `HELP` (name of the set -> one line),
`add_arguments(name, parser)` and `run(name, arguments) -> str`.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def preparers() -> dict[str, ModuleType]:
    """Return the module that prepares each set, by name of the set."""
    found: dict[str, ModuleType] = {}
    for item in pkgutil.iter_modules(__path__):
        if not item.name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{item.name}")
            found |= dict.fromkeys(module.HELP, module)
    return dict(sorted(found.items()))
