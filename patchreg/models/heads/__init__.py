"""Heads that several methods share."""

from .linear import LinearHead
from .projection import ProjectionHead

__all__ = ["LinearHead", "ProjectionHead"]
