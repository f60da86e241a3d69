"""Where a model looks: its score of every place, the chosen boxes in their order, and its classes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patchreg.pictures import add_model_arguments, check_out
from patchreg.runner.api import load
from patchreg.runner.predict import Prediction
from patchreg.utils.draw import save_figure

HELP = {"patches": "boxes that are looked at, in their order, and the map they come from"}
_SHOWN = 16
"""Boxes drawn per image; more cannot be told apart."""


def add_arguments(kind: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        kind: "patches".
        parser: Where to add them.
    """
    add_model_arguments(parser, "patches.png", 6)
    parser.add_argument("--budget", type=float, help="mean multiply-accumulates per image")


def run(kind: str, arguments: argparse.Namespace) -> str:
    """Draw the picture and say where it is.

    Args:
        kind: "patches".
        arguments: Parsed options.
    """
    check_out(arguments.out)
    model = load(arguments.config, arguments.checkpoint, budget=arguments.budget)
    found = model.predict(arguments.image, count=arguments.count)
    draw_patches(found, arguments.out)
    return f"written to {arguments.out}"


def draw_patches(found: Sequence[Prediction], path: str | Path) -> None:
    """Draw one column per image: boxes, map, classes.

    Args:
        found: Predictions.
        path: Picture file to write; its folder is made.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = len(found)
    figure, axes = plt.subplots(
        3,
        count,
        figsize=(2.5 * count + 0.3, 6.6),
        squeeze=False,
        layout="constrained",
        height_ratios=(1, 1, 0.6),
    )
    colours = [plt.get_cmap("tab10")(number) for number in range(10)]
    for column, one in zip(axes.T, found, strict=True):
        _draw_boxes(column[0], one, colours)
        _draw_map(column[1], one)
        _draw_classes(column[2], one)
    save_figure(figure, path)


def _draw_boxes(axis: Any, one: Prediction, colours: Sequence[Any]) -> None:
    from matplotlib.patches import Rectangle

    height, width = one.selection.image_size
    axis.imshow(one.image, extent=(0, width, height, 0), interpolation="nearest")
    unit = width / 224
    for number, (x0, y0, x1, y1) in enumerate(one.record["boxes"][:_SHOWN]):
        colour = colours[number % len(colours)]
        box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.8)
        axis.add_patch(box)
        axis.text(
            x0 + 3 * unit,
            y0 + 4 * unit,
            str(number + 1),
            fontsize=7,
            va="top",
            color="white",
            bbox=dict(facecolor=colour, edgecolor="none", pad=1.0),
        )
    title = _short(one.record["classes"][0]["name"], 26)
    if "stage" in one.record:
        views = one.record["stage"] + 1
        title += f"\n{views} of {one.record['stages']} views"
    axis.set_title(title, fontsize=8)
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)
    _bare(axis)


def _draw_map(axis: Any, one: Prediction) -> None:
    height, width = one.selection.image_size
    axis.imshow(one.image.mean(-1), cmap="gray", extent=(0, width, height, 0), vmin=0, vmax=255)
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)
    _bare(axis)
    if one.record.get("stage") == 0:
        axis.set_xlabel("sure at the first look, not localised", fontsize=7)
        return
    if one.selection.grid is None or np.prod(one.selection.grid) == 1:
        return
    rows, columns = one.selection.grid
    scores = one.selection.score[0].reshape(rows, columns).numpy()
    box = one.record["boxes"][0] if one.record["boxes"] else (0, 0, width / columns, height / rows)
    left, right = _span(width, columns, box[2] - box[0])
    top, bottom = _span(height, rows, box[3] - box[1])
    axis.imshow(scores, cmap="inferno", alpha=0.6, extent=(left, right, bottom, top))
    axis.set_xlabel(f"score {scores.min():.2g} to {scores.max():.2g}", fontsize=7)


def _span(size: float, cells: int, side: float) -> tuple[float, float]:
    """Return where a map of cells begins and ends whose windows may overlap: centres are kept."""
    step = (size - side) // (cells - 1) if cells > 1 else size
    return side / 2 - step / 2, side / 2 + (cells - 0.5) * step


def _draw_classes(axis: Any, one: Prediction) -> None:
    classes = one.record["classes"][:5][::-1]
    places = np.arange(len(classes))
    axis.barh(places, [entry["confidence"] for entry in classes], color="tab:blue", height=0.7)
    for place, entry in zip(places, classes):
        axis.text(0.02, place, _short(entry["name"], 24), fontsize=7, va="center")
    axis.set_xlim(0, 1)
    axis.set_yticks([])
    axis.tick_params(labelsize=6)
    share = one.record["macs"] / max(one.record["dense_macs"], 1.0)
    axis.set_xlabel(f"{one.record['macs'] / 1e6:.1f} MMACs, {share:.2f} of dense", fontsize=7)


def _short(text: str, length: int) -> str:
    # ImageNet's names are lists of synonyms.
    text = text.split(",")[0]
    return text if len(text) <= length else text[: length - 3] + "..."


def _bare(axis: Any) -> None:
    axis.tick_params(which="both", length=0, labelleft=False, labelbottom=False)
