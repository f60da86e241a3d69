"""Reproducible weights, small models and comparisons that the PatchDrop tests share."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from dge_helpers import Sample
from torch import Tensor, nn

from patchreg.methods.patchdrop.convert import from_official
from patchreg.registry import MODELS


def hash_u(name: str, count: int) -> np.ndarray:
    """Uniform numbers from an integer hash, the same on every machine."""
    mask = 0xFFFFFFFF
    index = np.arange(count, dtype=np.uint64)
    x = (index * 0x9E3779B1 + zlib.crc32(name.encode())) & mask
    x ^= x >> 16
    x = (x * 0x85EBCA6B) & mask
    x ^= x >> 13
    x = (x * 0xC2B2AE35) & mask
    x ^= x >> 16
    return x / 2**32


def hash_weights(tag: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a reference network; keys are those of the official one."""
    found = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            found[key] = value
            continue
        u = hash_u(f"{tag}:{key}", value.numel()).reshape(value.shape)
        if value.ndim == 4:
            u = (2 * u - 1) * np.sqrt(6 / value[0].numel())
        elif value.ndim == 2:
            u = (2 * u - 1) * np.sqrt(3 / value.shape[1])
        elif key.endswith(("running_var", "weight")):
            u = 0.5 + u
        else:
            u = (2 * u - 1) * 0.2
        found[key] = torch.tensor(u).float()
    return found


def hash_image(name: str, shape: tuple[int, int, int, int]) -> Tensor:
    """A reference image: coarse blocks and fine noise."""
    batch, channels, height, width = shape
    coarse = (2 * hash_u(name + "#coarse", batch * channels * 16) - 1).reshape(
        batch, channels, 4, 4
    )
    coarse = coarse.repeat(height // 4, 2).repeat(width // 4, 3)
    fine = (2 * hash_u(name + "#fine", coarse.size) - 1).reshape(shape)
    return torch.tensor(1.5 * (coarse + 0.25 * fine)).float()


def wide(width: int = 4, blocks: tuple[int, ...] = (1, 1, 1, 1), classes: int = 10) -> dict:
    """Config of a classifier of the released family."""
    return dict(
        type="PatchClassifier",
        backbone=dict(type="CIFARResNetBackbone", num_blocks=blocks, base_channels=width),
        head=dict(
            type="LinearHead", num_classes=classes, in_channels=8 * width, pool="mean", init="torch"
        ),
    )


def policy(width: int = 4, **kwargs: Any) -> dict:
    """Config of a policy of the released family."""
    return dict(
        type="PatchDropSelector",
        backbone=dict(type="CIFARResNetBackbone", num_blocks=(1, 1, 1, 1), base_channels=width),
        in_channels=8 * width,
        **kwargs,
    )


def patchdrop(stage: str = "pretrain", width: int = 4, penalty: float = -0.5, **kwargs: Any) -> Any:
    """A small PatchDropClassifier."""
    config = dict(
        type="PatchDropClassifier",
        classifier=wide(width),
        selector=policy(width),
        overview=dict(type="LowResolutionViewPreprocessor", size=8),
        policy_loss=dict(
            type="PatchDropPolicyLoss",
            penalty=penalty,
            reduction="patch_mean" if stage == "pretrain" else "patch_sum",
        ),
        stage=stage,
        random_parts=True,
    )
    if stage == "twostream":
        config["lr_classifier"] = wide(width)
    return MODELS.build({**config, **kwargs})


def load_official(part: nn.Module, state: dict[str, Tensor], is_policy: bool = False) -> None:
    """Load a reference network into one of our parts."""
    part.load_state_dict(from_official(state, "golden", policy=is_policy))


def labelled(targets: Tensor) -> list[Sample]:
    """Samples with labels."""
    return [Sample(gt_label=target.reshape(1)) for target in targets]


def feed_draws(model: Any, draws: list[Tensor]) -> None:
    """Let the policy use recorded draws instead of random ones."""
    rest = iter(draws)
    model.selector.draws = lambda overview, dtype: next(rest).to(dtype)
