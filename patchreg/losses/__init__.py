"""Losses that several methods share; a loss knows no model class."""

from .contrastive import ContrastiveLoss
from .cross_entropy import CrossEntropyLoss

__all__ = ["ContrastiveLoss", "CrossEntropyLoss"]
