"""PW-Self: self-distillation of every token, views matched patch to patch by their geometry."""

from . import hook, loss, matching, model

__all__ = ["hook", "loss", "matching", "model"]
