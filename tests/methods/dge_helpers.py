"""Small models and comparisons that the DGE tests share."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor

from patchreg.registry import MODELS


class Sample(BaseDataElement):
    """Stand-in for mmpretrain's DataSample, which is slow to import."""

    def set_pred_score(self, value: Tensor) -> None:
        self.pred_score = value

    def set_pred_label(self, value: Tensor) -> None:
        self.pred_label = value


def samples(targets: Tensor) -> list[Sample]:
    """One sample per row of soft targets, or per label."""
    field = "gt_score" if targets.is_floating_point() else "gt_label"
    return [Sample(**{field: target}) for target in targets]


def classifier(
    dims: int = 24, depth: int = 3, heads: int = 3, classes: int = 10, **kwargs: Any
) -> torch.nn.Module:
    """A small DGE classifier; arguments go to the backbone, `head_` and `model_` ones there."""
    head = {key[5:]: kwargs.pop(key) for key in list(kwargs) if key.startswith("head_")}
    model = {key[6:]: kwargs.pop(key) for key in list(kwargs) if key.startswith("model_")}
    backbone = dict(
        type="DGEVisionTransformerBackbone",
        arch=dict(embed_dims=dims, depth=depth, num_heads=heads),
        img_size=64,
        patch_size=8,
        mlp_ratio=2,
    )
    backbone.update(kwargs)
    cfg = dict(
        type="DGEClassifier",
        backbone=backbone,
        head=dict(type="LinearHead", num_classes=classes, in_channels=dims, **head),
        budget_loss=dict(type="DGEBudgetLoss", budget=0.5),
    )
    cfg.update(model)
    return MODELS.build(cfg)


def spread_routers(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw lively weights so that tokens differ and every candidate is chosen somewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            fan_in = value[0].numel() if value.ndim > 1 else 1
            drawn = torch.randn(value.shape, generator=generator)
            if "router.gate.weight" in name:
                value.copy_(drawn)
            elif name.endswith("bias"):
                value.copy_(drawn * 0.1)
            elif value.ndim > 1:
                value.copy_(drawn / (1.0 if "token" in name or "pos" in name else fan_in**0.5))
    return model


def force_choice(model: torch.nn.Module, candidate: int) -> None:
    """Make every router choose one candidate everywhere."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "router.gate" in name:
                value.zero_()
            if "router.gate.bias" in name:
                value[candidate] = 10.0


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected magnitude."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def total(losses: dict[str, Tensor]) -> Tensor:
    """Sum of the entries that are optimised."""
    return sum(value for key, value in losses.items() if "loss" in key)
