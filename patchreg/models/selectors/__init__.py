"""Choosing patches: soft ranks, rankers, selection."""

from .rank import RankSelector
from .rankers import CentreSelector, ClassAttentionSelector, GradientSelector, RandomSelector

__all__ = [
    "CentreSelector",
    "ClassAttentionSelector",
    "GradientSelector",
    "RandomSelector",
    "RankSelector",
]
