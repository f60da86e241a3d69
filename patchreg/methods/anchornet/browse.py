"""What AnchorNet adds to the pictures of its data: the shrunk image, the windows, the five crops."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from mmengine.config import Config

from patchreg.methods.anchornet.ensemble import AnchorNetEnsembleClassifier
from patchreg.methods.anchornet.model import (
    AnchorNetClassifier,
    AnchorNetPatchClassifier,
    AnchorNetResizedClassifier,
)
from patchreg.methods.anchornet.trunk import Window
from patchreg.methods.anchornet.views import five_crop_origins, resized_view
from patchreg.registry import MODELS
from patchreg.runner.browse import Look, Panel, Strip


def strips(config: Config, look: Look) -> list[Strip]:
    """Return what the networks look at: which windows are chosen depends on weights, so all are meant.

    Args:
        config: Config of a run.
        look: One image.
    """
    model = config.model
    kind = MODELS.get(model["type"])
    panels: list[Panel] = []
    if issubclass(kind, AnchorNetResizedClassifier):
        panels.append(_shrunk(look, model.get("view_size", 95)))
    elif issubclass(kind, AnchorNetEnsembleClassifier):
        panels.append(_shrunk(look, model.resized.get("view_size", 95)))
        panels.append(_windows(look, _window(model.anchor)))
    elif issubclass(kind, AnchorNetClassifier) and model.backbone["type"] == "AnchorNetBackbone":
        panels.append(_windows(look, _window(model)))
    elif issubclass(kind, AnchorNetPatchClassifier):
        window = _window(model.anchor)
        five = not look.training and model.get("evaluation", "five_crop") == "five_crop"
        panels += _five_crops(look, window.side) if five else [_windows(look, window)]
    return [Strip("views", panels)] if panels else []


def _window(model: Any) -> Window:
    return MODELS.build(model.backbone).window


def _shrunk(look: Look, side: int) -> Panel:
    image = torch.from_numpy(look.fed[0]).permute(2, 0, 1)[None].float()
    shrunk = resized_view(image, side)[0].round().clamp(0, 255).to(torch.uint8)
    return Panel(f"first look\n{side} x {side} px", shrunk.permute(1, 2, 0).numpy())


def _windows(look: Look, window: Window) -> Panel:
    """Show the size of the windows at the first places, and how many there are."""
    image = look.fed[0]
    rows, columns = window.grid(*image.shape[:2])
    step = window.stride
    boxes = [(0, 0), (0, min(1, columns - 1) * step), (min(1, rows - 1) * step, 0)]
    boxes += [((rows - 1) * step, (columns - 1) * step)]
    return Panel(
        f"{rows} x {columns} windows of {window.side} px\nevery {step} px",
        image,
        draw=partial(_boxes, corners=list(dict.fromkeys(boxes)), side=window.side),
    )


def _five_crops(look: Look, side: int) -> list[Panel]:
    image = look.fed[0]
    corners = five_crop_origins(image.shape[0], image.shape[1], side)
    panels = [
        Panel(f"five crops\nof {side} px", image, draw=partial(_boxes, corners=corners, side=side))
    ]
    for number, (top, left) in enumerate(corners):
        crop = image[top : top + side, left : left + side]
        panels.append(Panel(f"crop {number + 1}\n{side} x {side} px", crop, colour=f"C{number}"))
    return panels


def _boxes(axis: Any, corners: Sequence[tuple[int, int]], side: int) -> None:
    from matplotlib.patches import Rectangle

    for number, (top, left) in enumerate(corners):
        place = Rectangle(
            (left, top), side, side, fill=False, edgecolor=f"C{number}", linewidth=2, clip_on=False
        )
        axis.add_patch(place)
