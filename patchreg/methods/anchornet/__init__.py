"""AnchorNet: localise semantic patches, classify one after another, stop when sure (ICME 2022)."""

from . import convert, head, model, selector, trunk

__all__ = ["convert", "head", "model", "selector", "trunk"]
