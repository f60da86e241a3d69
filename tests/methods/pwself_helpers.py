"""Weights, models and comparisons that the PW-Self tests share."""

from __future__ import annotations

from typing import Any

import torch
from golden_reader import GoldenFile
from torch import Tensor, nn

from patchreg.registry import MODELS


def below(golden: GoldenFile, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors whose name starts with a prefix, named without it; floats in a type."""
    return {
        name[len(prefix) :]: cast(golden[name], dtype) for name in golden if name.startswith(prefix)
    }


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor in a type, others as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def backbone(depth: int = 3, heads: int = 3, dims: int = 24, **kwargs: Any) -> nn.Module:
    """The encoder of the reference numbers: 32 px, patches of 8 px."""
    return MODELS.build(
        dict(
            type="VisionTransformerBackbone",
            arch=dict(embed_dims=dims, depth=depth, num_heads=heads),
            img_size=32,
            patch_size=8,
            pos_resize="dino",
            crop_remainder=True,
            **kwargs,
        )
    )


def head(out_dim: int = 30, **kwargs: Any) -> nn.Module:
    """The head of the reference numbers."""
    return MODELS.build(
        dict(
            type="ProjectionHead",
            in_channels=24,
            out_dim=out_dim,
            hidden_dim=40,
            bottleneck_dim=12,
            **kwargs,
        )
    )


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected magnitude."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def tolerance(dtype: torch.dtype, kind: str = "forward") -> float:
    """What the description of the reference numbers allows, relative to the largest one."""
    single = {"forward": 2e-5, "gradient": 1e-4, "loss": 1e-5}
    # The reference itself was computed in float32.
    double = {"forward": 2e-6, "gradient": 1e-5, "loss": 2e-6}
    return (double if dtype == torch.float64 else single)[kind]
