"""Backbones that several methods share."""

from .pixels import PixelBackbone
from .pvt import PyramidVisionTransformerBackbone
from .timm import TimmBackbone
from .torchvision import TorchvisionBackbone
from .vit import VisionTransformerBackbone

__all__ = [
    "PixelBackbone",
    "PyramidVisionTransformerBackbone",
    "TimmBackbone",
    "TorchvisionBackbone",
    "VisionTransformerBackbone",
]
