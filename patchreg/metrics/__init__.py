"""Metrics that several methods share."""

from .cost import CostMetric

__all__ = ["CostMetric"]
