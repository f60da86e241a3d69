"""PW-Self in float64 for the test of several processes; imported by name in each of them."""

from __future__ import annotations

from typing import Any

from patchreg.registry import MODELS

if "DoublePWSelfPretrainer" not in MODELS:
    base: Any = MODELS.get("PWSelfPretrainer")

    class DoublePWSelfPretrainer(base):
        """A `PWSelfPretrainer` in float64, from its construction on."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.double()

        __init__.__wrapped__ = base.__init__  # type: ignore[attr-defined]

    MODELS.register_module(module=DoublePWSelfPretrainer)
