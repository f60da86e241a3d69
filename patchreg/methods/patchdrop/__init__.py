"""PatchDrop: a policy decides on an overview which high-resolution patches are acquired."""

from . import convert, hook, legacy, loop, loss, mask, metric, model, patchwise, selector

__all__ = [
    "convert",
    "hook",
    "legacy",
    "loop",
    "loss",
    "mask",
    "metric",
    "model",
    "patchwise",
    "selector",
]
