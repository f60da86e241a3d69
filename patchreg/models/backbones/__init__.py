"""Backbones that several methods share."""

from .pixels import PixelBackbone
from .timm import TimmBackbone
from .vit import VisionTransformerBackbone

__all__ = ["PixelBackbone", "TimmBackbone", "VisionTransformerBackbone"]
