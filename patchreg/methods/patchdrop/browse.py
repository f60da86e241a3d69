"""What PatchDrop adds to the pictures of its data: the policy's low-resolution view, and the patches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from mmengine.config import Config

from patchreg.methods.patchdrop.model import PatchDropClassifier
from patchreg.registry import MODELS
from patchreg.runner.browse import Look, Panel, Strip


def strips(config: Config, look: Look) -> list[Strip]:
    """Return the patches to decide about, and what the policy sees.

    Args:
        config: Config of a run.
        look: One image.
    """
    model = config.model
    if not issubclass(MODELS.get(model["type"]), PatchDropClassifier):
        return []
    image = look.fed[0]
    grid = tuple(model.get("grid", (4, 4)))
    side = model.get("patch_size")
    patch = (side, side) if side else (image.shape[0] // grid[0], image.shape[1] // grid[1])
    view = MODELS.build(model.overview)(torch.from_numpy(image).permute(2, 0, 1)[None].float())
    seen = view[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    panels = [
        Panel(
            f"patches to choose\n{grid[0]} x {grid[1]} of {patch[0]} px",
            image,
            draw=partial(_grid, grid=grid, patch=patch),
        ),
        Panel(f"policy sees\n{seen.shape[1]} x {seen.shape[0]} px", seen),
    ]
    return [Strip("policy", panels)]


def _grid(axis: Any, grid: tuple[int, int], patch: tuple[int, int]) -> None:
    height, width = grid[0] * patch[0], grid[1] * patch[1]
    style = dict(color="white", linewidth=1.0)
    for row in range(grid[0] + 1):
        axis.plot((0, width), (row * patch[0],) * 2, clip_on=False, **style)
    for column in range(grid[1] + 1):
        axis.plot((column * patch[1],) * 2, (0, height), clip_on=False, **style)
