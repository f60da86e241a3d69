"""What PW-Self adds to the pictures of its data: which patches of two views are compared."""

from __future__ import annotations

import inspect
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from mmengine.config import Config
from torch import Tensor

from patchreg.methods.pwself.matching import match_pair
from patchreg.methods.pwself.model import PWSelfPretrainer
from patchreg.methods.pwself.picture import draw_view
from patchreg.registry import MODELS
from patchreg.runner.browse import Look, Panel, Strip, view_colours


def strips(config: Config, look: Look) -> list[Strip]:
    """Return pairs of a teacher's and a student's view with equal colours on matched patches.

    Args:
        config: Config of a run.
        look: One image.
    """
    model = config.model
    if look.geometry is None or not issubclass(MODELS.get(model["type"]), PWSelfPretrainer):
        return []
    patch = _value(MODELS.get(model.backbone["type"]), model.backbone, "patch_size")
    teachers = _value(PWSelfPretrainer, model, "num_global")
    rule = _value(PWSelfPretrainer, model, "matching")
    panels: list[Panel] = []
    pairs = [(a, b) for a, b in product(range(teachers), range(len(look.fed))) if a != b]
    for pair in pairs[: max(len(look.fed) // 2, 1)]:
        sizes = [look.geometry.sizes[view] for view in pair]
        grids = [(height // patch, width // patch) for height, width in sizes]
        tokens = match_pair(look.geometry, pair, (grids[0], grids[1]), rule)[0]
        panels += _pair(look, pair, grids, tokens)
    return [Strip(f"matched patches\n({rule})", panels)]


def _value(owner: Any, settings: Any, name: str) -> Any:
    """Return an argument of a config, or its default."""
    return settings.get(name, inspect.signature(owner).parameters[name].default)


def _pair(
    look: Look, pair: tuple[int, int], grids: list[tuple[int, int]], tokens: tuple[Tensor, Tensor]
) -> list[Panel]:
    count = len(tokens[0]) - 1
    # In so small a picture the numbers of more patches would overlap.
    numbers = max(max(grid) for grid in grids) <= 8
    colours = _colours(tokens[0], grids[0], numbers)
    panels = []
    for view, grid, matched, role in zip(pair, grids, tokens, ("teacher", "student"), strict=True):
        image = look.fed[view]
        # Pale, so that colours without numbers can be told apart.
        below = image if numbers else _pale(image)
        panels.append(
            Panel(
                f"view {view + 1} ({role})\n{grid[0]} x {grid[1]} patches",
                image,
                note=f"{count} pairs" if role == "teacher" else "",
                colour=view_colours(len(look.fed))[view],
                draw=partial(
                    draw_view,
                    view=below,
                    grid=grid,
                    tokens=matched,
                    colours=colours,
                    numbers=numbers,
                ),
            )
        )
    return panels


def _pale(image: np.ndarray) -> np.ndarray:
    grey = image.mean(-1, keepdims=True).repeat(3, axis=-1)
    return (255 - (255 - grey) / 2).astype(np.uint8)


def _colours(tokens: Tensor, grid: tuple[int, int], numbered: bool) -> np.ndarray:
    """Return one colour per pair; without numbers, hues go along the rows and get lighter downwards."""
    import matplotlib

    if numbered:
        return matplotlib.colormaps["hsv"](np.linspace(0, 0.92, max(len(tokens) - 1, 1)))
    patches = tokens[1:].numpy() - 1
    rows, columns = (_spread(part) for part in (patches // grid[1], patches % grid[1]))
    colours = np.stack((0.85 * columns, np.ones_like(rows), 0.3 + 0.7 * rows), axis=-1)
    return matplotlib.colors.hsv_to_rgb(colours)


def _spread(places: np.ndarray) -> np.ndarray:
    """Return places along an axis as values from 0 to 1."""
    first = places.min(initial=places.max(initial=0))
    return (places - first) / max(places.max(initial=0) - first, 1)
