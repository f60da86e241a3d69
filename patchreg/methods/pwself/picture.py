"""Which patches of two views of an image PW-Self compares, as coloured pairs."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchreg.methods.pwself.matching import RULES, match_pair
from patchreg.registry import TRANSFORMS
from patchreg.structures import ViewGeometry
from patchreg.transforms.multi_view import MultiView
from patchreg.utils.draw import save_figure
from patchreg.utils.errors import ConfigError

HELP = {"matching": "which patches of two views of an image are compared"}

GLOBAL = dict(size=224, scale=(0.4, 1.0))
LOCAL = dict(size=96, scale=(0.05, 0.4))
PAIRS = {"global-local": (GLOBAL, LOCAL), "global-global": (GLOBAL, GLOBAL)}
_NO_COLOURS = dict(jitter=0.0, gray=0.0)


def add_arguments(kind: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        kind: "matching".
        parser: Where to add them.
    """
    parser.add_argument("image", help="image file")
    parser.add_argument("--out", default="matching.png", help="picture to write")
    parser.add_argument("--patch-size", type=int, default=32, metavar="PX", help="default 32")
    parser.add_argument(
        "--pair", choices=list(PAIRS), default="global-local", help="kinds of views"
    )
    parser.add_argument("--rule", choices=list(RULES), default="published", help="rule of matching")
    parser.add_argument("--seed", type=int, default=0, help="seed of the two views (default 0)")


def run(kind: str, arguments: argparse.Namespace) -> str:
    """Draw the picture; return the matched tokens and where it is.

    Args:
        kind: "matching".
        arguments: Parsed options.
    """
    first, second = draw_matching(
        arguments.image,
        arguments.out,
        arguments.patch_size,
        arguments.pair,
        arguments.rule,
        arguments.seed,
    )
    lists = [" ".join(str(token) for token in tokens.tolist()) for tokens in (first, second)]
    return (
        f"{len(first)} pairs of tokens, 0 is the class token\nteacher: {lists[0]}\nstudent: {lists[1]}\n"
        f"written to {arguments.out}"
    )


def draw_matching(
    source: str,
    out: str,
    patch_size: int = 32,
    pair: str = "global-local",
    rule: str = "published",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draw two random views of an image, and their matched patches in equal colours.

    Source:
        `patch_matching.py` of the official code, which draws the grids and prints the lists.

    Args:
        source: Image file.
        out: Picture to write.
        patch_size: Side of a patch in px.
        pair: A key of `PAIRS`.
        rule: `published` or `containment`.
        seed: Seed of the two views.

    Returns:
        The matched tokens of the teacher's and the student's view, class tokens first.

    Raises:
        ConfigError: A patch is larger than a view, or the picture's name has no known ending.
        UserError: The image cannot be read.
    """
    kinds = PAIRS[pair]
    if not 1 <= patch_size <= min(int(kind["size"]) for kind in kinds):  # type: ignore[call-overload]
        raise ConfigError(
            f"--patch-size {patch_size}: expected 1 to the side of the smaller view, "
            f"{min(int(kind['size']) for kind in kinds)}"  # type: ignore[call-overload]
        )
    if Path(out).suffix.lower() not in (".png", ".pdf", ".svg", ".jpg"):
        raise ConfigError(f"--out '{out}': expected a file ending in .png, .pdf, .svg or .jpg")
    image = TRANSFORMS.build(dict(type="LoadImage"))(dict(img_path=source))["img"]
    random.seed(seed)
    torch.manual_seed(seed)
    packed = MultiView([dict(kind, **_NO_COLOURS) for kind in kinds], source_size=None)(
        dict(img=image)
    )
    views = [view.permute(1, 2, 0).numpy() for view in packed["inputs"]]
    sizes = tuple((view.shape[0], view.shape[1]) for view in views)
    boxes, flips = packed["views"]["boxes"], packed["views"]["flips"]
    geometry = ViewGeometry(boxes[None], flips[None], sizes)
    grids = tuple((height // patch_size, width // patch_size) for height, width in sizes)
    first, second = match_pair(geometry, (0, 1), (grids[0], grids[1]), rule)[0]
    _draw(image, views, geometry, grids, (first, second), out)
    return first, second


def _draw(
    image: np.ndarray,
    views: list[np.ndarray],
    geometry: ViewGeometry,
    grids: tuple[tuple[int, int], ...],
    pairs: tuple[Tensor, Tensor],
    out: str,
) -> None:

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    axes[0].imshow(image)
    axes[0].set_title("source and boxes of the views", fontsize=10)
    colours = plt.get_cmap("hsv")(np.linspace(0, 0.92, max(len(pairs[0]) - 1, 1)))
    names = ("teacher", "student")
    for view, (axis, name) in enumerate(zip(axes[1:], names, strict=True)):
        top, left, height, width = geometry.boxes[0, view].tolist()
        style: dict[str, Any] = dict(fill=False, linewidth=2.5, edgecolor=("white", "black")[view])
        axes[0].add_patch(Rectangle((left, top), width, height, **style))
        # The first box is named at its upper left corner, the second at its lower right.
        corner = (left + 3, top + 3) if view == 0 else (left + width - 3, top + height - 3)
        axes[0].text(
            *corner,
            name,
            va=("top", "bottom")[view],
            ha=("left", "right")[view],
            color=("black", "white")[view],
            fontsize=8,
            bbox=dict(facecolor=style["edgecolor"], pad=1.5, linewidth=0),
        )
        draw_view(axis, views[view], grids[view], pairs[view], colours)
        mirrored = ", mirrored" if geometry.flips[0, view] else ""
        axis.set_title(
            f"{name}: {grids[view][0]} x {grids[view][1]} patches{mirrored}", fontsize=10
        )
    for axis in axes:
        axis.set_axis_off()
    figure.suptitle(
        f"{len(pairs[0]) - 1} pairs of patches; equal numbers are compared", fontsize=11
    )
    save_figure(figure, out)


def draw_view(
    axis: Any,
    view: np.ndarray,
    grid: tuple[int, int],
    tokens: Tensor,
    colours: np.ndarray,
    numbers: bool = True,
) -> None:
    """Draw a view with its grid of patches, and its matched patches coloured and numbered.

    Args:
        axis: Axis of Matplotlib.
        view: The view.
        grid: Rows and columns of patches.
        tokens: Its matched tokens, the class token first.
        colours: One colour per pair of patches.
        numbers: Whether to write the number of the pair into each patch.

    Shape:
        view [H, W, 3] uint8; tokens [1 + M]; colours [M, 4].
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    axis.imshow(view)
    height, width = view.shape[0] / grid[0], view.shape[1] / grid[1]
    for row in range(grid[0]):
        for column in range(grid[1]):
            place = (column * width - 0.5, row * height - 0.5)
            axis.add_patch(
                Rectangle(place, width, height, fill=False, edgecolor="gray", linewidth=0.5)
            )
    fontsize = 8 if max(grid) <= 8 else 5
    # The first pair is that of the class tokens.
    for number, token in enumerate(tokens[1:].tolist(), 1):
        row, column = divmod(token - 1, grid[1])
        place = (column * width - 0.5, row * height - 0.5)
        axis.add_patch(
            Rectangle(place, width, height, color=colours[number - 1], alpha=0.45, linewidth=0)
        )
        if not numbers:
            continue
        axis.text(
            place[0] + width / 2,
            place[1] + height / 2,
            str(number),
            ha="center",
            va="center",
            fontsize=fontsize,
            color="white",
            path_effects=[withStroke(linewidth=1.5, foreground="black")],
        )
