"""PatchGame: two agents play a referential game about patches."""

from . import convert, hook, metric, model

__all__ = ["convert", "hook", "metric", "model"]
