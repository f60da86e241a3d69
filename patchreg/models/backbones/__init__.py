"""Backbones that several methods share."""

from .cifar_resnet import CIFARResNetBackbone, ThinCIFARResNetBackbone
from .pixels import PixelBackbone
from .pvt import PyramidVisionTransformerBackbone
from .timm import TimmBackbone
from .torchvision import TorchvisionBackbone
from .vit import VisionTransformerBackbone

__all__ = [
    "CIFARResNetBackbone",
    "PixelBackbone",
    "PyramidVisionTransformerBackbone",
    "ThinCIFARResNetBackbone",
    "TimmBackbone",
    "TorchvisionBackbone",
    "VisionTransformerBackbone",
]
