"""Model parts that several methods share: preprocessor, backbones, heads, classifier."""

from patchreg.models import preprocessor, views

from .backbones import TimmBackbone, VisionTransformerBackbone
from .base import PatchClassifier, TokenFeatures, stack_targets
from .features import FeatureExtractor
from .heads import LinearHead

__all__ = [
    "FeatureExtractor",
    "LinearHead",
    "PatchClassifier",
    "TimmBackbone",
    "TokenFeatures",
    "VisionTransformerBackbone",
    "preprocessor",
    "stack_targets",
    "views",
]
