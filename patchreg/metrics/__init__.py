"""Metrics that several methods share."""

from .cost import CostMetric
from .features import FeatureMetric, FeatureSet
from .knn import KNNMetric

__all__ = ["CostMetric", "FeatureMetric", "FeatureSet", "KNNMetric"]
