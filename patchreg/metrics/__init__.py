"""Metrics that several methods share."""

from .copy_detection import CopyDetectionMetric
from .cost import CostMetric
from .davis import DavisMetric
from .features import FeatureMetric, FeatureSet
from .knn import KNNMetric
from .retrieval import RetrievalMetric

__all__ = [
    "CopyDetectionMetric",
    "CostMetric",
    "DavisMetric",
    "FeatureMetric",
    "FeatureSet",
    "KNNMetric",
    "RetrievalMetric",
]
