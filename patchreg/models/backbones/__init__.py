"""Backbones that several methods share."""

from .timm import TimmBackbone
from .vit import VisionTransformerBackbone

__all__ = ["TimmBackbone", "VisionTransformerBackbone"]
