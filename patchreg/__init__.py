"""Plug-in training engine on MMEngine for vision methods that look at an image patch by patch.

`patchreg.load("dge/quick")` gives a trained model that predicts, selects patches and makes features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchreg.runner.api import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # The engine behind it takes a second to import, which the plug-ins and the operators do not need.
    if name == "load":
        from patchreg.runner.api import load

        return load
    raise AttributeError(f"module 'patchreg' has no attribute '{name}'")
