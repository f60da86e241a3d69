"""Heads that several methods share."""

from .linear import LinearHead

__all__ = ["LinearHead"]
