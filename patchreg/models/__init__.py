"""Model parts that several methods share: preprocessor, backbones, heads, classifier."""

from patchreg.models import preprocessor, views

from .backbones import TimmBackbone, VisionTransformerBackbone
from .base import PatchClassifier, TokenFeatures, stack_targets
from .heads import LinearHead

__all__ = [
    "LinearHead",
    "PatchClassifier",
    "TimmBackbone",
    "TokenFeatures",
    "VisionTransformerBackbone",
    "preprocessor",
    "stack_targets",
    "views",
]
