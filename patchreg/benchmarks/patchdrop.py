"""PatchDrop: erasing patches, and whether dropped patches save time.

Masks are made for the images of the released 224-px networks. The classifiers are a patch-token
transformer, a bag of patches and ResNet-32 on erased images, all for CIFAR's 32 px.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchreg.benchmarks import figure, interleave
from patchreg.methods.patchdrop.mask import mask_patches
from patchreg.methods.patchdrop.selector import keep_best
from patchreg.registry import MODELS

BATCH = 64
ROUNDS = 9
MASK_GOAL, TOKEN_GOAL = 0.6, 1.6
TOKENS = dict(
    type="PatchDropTokenClassifier",
    backbone=dict(
        type="VisionTransformerBackbone",
        arch=dict(embed_dims=192, depth=6, num_heads=3),
        img_size=32,
        patch_size=2,
        mlp_ratio=2,
    ),
    head=dict(type="LinearHead", num_classes=10, in_channels=192),
)
BAG = dict(
    type="PatchDropBagClassifier",
    backbone=dict(type="ThinCIFARResNetBackbone", depth=32),
    head=dict(type="LinearHead", num_classes=10, in_channels=64, pool="mean", init="torch"),
)
MASKED = dict(
    type="PatchClassifier",
    backbone=dict(type="ThinCIFARResNetBackbone", depth=32),
    head=dict(type="LinearHead", num_classes=10, in_channels=64, pool="mean", init="torch"),
)


def mask_by_patches(images: Tensor, actions: Tensor) -> Tensor:
    """Erase patches one by one: copy each to an empty image, then multiply it by the decisions.

    This is the official loop, with the copy of the batch that it begins with.

    Args:
        images: Images.
        actions: Decisions over a 4 x 4 grid.

    Shape:
        images [B, C, H, W]; actions [B, 16].
    """
    side = images.shape[2] // 4
    images, erased = images.clone(), torch.zeros_like(images)
    for cell in range(16):
        rows = slice(cell // 4 * side, cell // 4 * side + side)
        columns = slice(cell % 4 * side, cell % 4 * side + side)
        erased[:, :, rows, columns] = images[:, :, rows, columns]
        erased[:, :, rows, columns] *= actions[:, cell].view(-1, 1, 1, 1)
    return erased


def run(device: str) -> list[dict[str, Any]]:
    """Run the benchmark.

    Args:
        device: `cpu` or `cuda`.
    """
    torch.manual_seed(0)
    return [*_masking(device), *_classifiers(device)]


def _clock(device: str) -> Callable[[], float]:
    """Return CPU time for a CPU, where other programs run; a GPU is waited for."""
    return time.process_time if device == "cpu" else time.perf_counter


def _ratio(first: list[float], second: list[float]) -> float:
    pairs = zip(first, second, strict=True)
    return statistics.median(a / b for a, b in pairs)


def _masking(device: str) -> list[dict[str, Any]]:
    images = torch.randn(BATCH, 3, 224, 224, device=device)
    actions = (torch.rand(BATCH, 16, device=device) < 0.5).float()
    ways = (mask_patches, mask_by_patches)
    calls = [_done(partial(way, images, actions)) for way in ways]
    if not torch.equal(mask_patches(images, actions), mask_by_patches(images, actions)):
        raise RuntimeError("the two ways of masking differ")
    ours, loop = interleave(calls, ROUNDS, _clock(device))
    return [
        figure(
            "masking, B=64, 224 px",
            1e3 * statistics.median(ours),
            "ms",
            1e3 * statistics.median(loop),
            _ratio(ours, loop),
            MASK_GOAL,
        )
    ]


@torch.inference_mode()
def _classifiers(device: str) -> list[dict[str, Any]]:
    images = torch.randn(BATCH, 3, 32, 32, device=device)
    score = torch.rand(BATCH, 16, device=device)
    figures = []
    models = {"patch tokens": TOKENS, "bag of patches": BAG, "erased image": MASKED}
    counts = (16, 8, 4)
    for name, config in models.items():
        model = MODELS.build(config).to(device).eval()
        actions = [keep_best(score, count).float() for count in counts]

        calls = [_done(partial(_classify, model, images, chosen)) for chosen in actions]
        times = interleave(calls, ROUNDS, _clock(device))
        for count, seconds in zip(counts, times, strict=True):
            goal = TOKEN_GOAL if (name, count) == ("patch tokens", 8) else None
            figures.append(
                figure(
                    f"{name}, {count} of 16 patches: images/s, ratio to 16",
                    BATCH / statistics.median(seconds),
                    "images/s",
                    BATCH / statistics.median(times[0]),
                    _ratio(times[0], seconds),
                    goal,
                    at_most=False,
                )
            )
        mixed = (torch.rand(BATCH, 16, device=device) < 0.5).float()
        calls = [_done(partial(_classify, model, images, chosen)) for chosen in (mixed, actions[1])]
        both = interleave(calls, ROUNDS, _clock(device))
        figures.append(
            figure(
                f"{name}, 8 patches on average, other numbers in every image: time, ratio to 8 in all",
                1e3 * statistics.median(both[0]),
                "ms",
                1e3 * statistics.median(both[1]),
                _ratio(*both),
            )
        )
    return figures


def _classify(model: Any, images: Tensor, actions: Tensor) -> Tensor:
    if hasattr(model, "classify"):
        return model.classify(images, actions, (4, 4))[0]
    return model(mask_patches(images, actions))


def _done(call: Callable[[], Tensor]) -> Callable[[], float]:
    """Wait for the result by reading one value of it."""
    return lambda: call().flatten()[0].item()
