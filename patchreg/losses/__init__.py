"""Losses that several methods share; a loss knows no model class."""

from .cross_entropy import CrossEntropyLoss

__all__ = ["CrossEntropyLoss"]
