"""Model parts that several methods share: preprocessor, backbones, heads, classifier."""

from patchreg.models import multi_view, preprocessor, selectors, timm_patches, views

from .backbones import TimmBackbone, VisionTransformerBackbone
from .base import PatchClassifier, TokenFeatures, stack_targets
from .features import FeatureExtractor
from .heads import LinearHead
from .probe import LinearProbeClassifier, LinearProbeHead
from .token_merging import TokenMergingClassifier

__all__ = [
    "FeatureExtractor",
    "LinearHead",
    "LinearProbeClassifier",
    "LinearProbeHead",
    "PatchClassifier",
    "TimmBackbone",
    "TokenFeatures",
    "TokenMergingClassifier",
    "VisionTransformerBackbone",
    "multi_view",
    "preprocessor",
    "selectors",
    "stack_targets",
    "timm_patches",
    "views",
]
