"""PW-Self: self-distillation of every token, views matched patch to patch by their geometry."""

from . import convert, hook, loss, matching, model, picture

__all__ = ["convert", "hook", "loss", "matching", "model", "picture"]
