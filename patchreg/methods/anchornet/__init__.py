"""AnchorNet: localise semantic patches, classify one after another, stop when sure (ICME 2022)."""

from . import convert, ensemble, head, loop, metric, model, selector, trunk

__all__ = ["convert", "ensemble", "head", "loop", "metric", "model", "selector", "trunk"]
