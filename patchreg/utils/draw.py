"""Pictures of what a method looked at."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchreg.structures import PatchSelection
from patchreg.utils.files import write_safely


def draw_selection(
    images: Tensor | np.ndarray,
    selection: PatchSelection,
    path: str | Path,
    titles: Sequence[str] = (),
    meaning: str = "share of full sampling",
    blocks: Tensor | None = None,
) -> None:
    """Draw images and, below each, how finely each of its cells was looked at.

    With `blocks` the mean comes first, then a row for every block.

    Args:
        images: Images as uint8 RGB.
        selection: Selection over a grid for the same images.
        path: Picture file to write; its folder is made.
        titles: One title per image.
        meaning: What the colours stand for.
        blocks: The same resolution in every block, over the grid of the selection.

    Shape:
        images [B, H, W, 3]; blocks [B, blocks, rows, columns].

    Raises:
        ValueError: Counts differ, or the selection has no grid.
    """
    if selection.grid is None:
        raise ValueError("a selection of free boxes has no cells to colour; draw its boxes instead")
    if len(images) != len(selection):
        raise ValueError(f"{len(images)} images but a selection of {len(selection)}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = len(images)
    height, width = selection.image_size
    shares = selection.resolution.reshape(count, 1, *selection.grid).cpu()
    if blocks is not None:
        shares = torch.cat((shares, blocks.cpu()), dim=1)
    layers = shares.shape[1]
    # Deep models get smaller pictures, so that the file can still be looked at.
    side = 1.6 if layers < 8 else 1.1
    figure, axes = plt.subplots(
        1 + layers,
        count,
        figsize=(side * count + 0.9, 1.08 * side * (1 + layers) + 0.3),
        squeeze=False,
        layout="constrained",
    )
    low, high = float(shares.min()), float(shares.max())
    if low == high:
        low, high = 0.0, 1.0
    rows, columns = selection.grid
    for index in range(count):
        image = np.asarray(images[index])
        axes[0, index].imshow(image, extent=(0, width, height, 0), interpolation="nearest")
        if index < len(titles):
            axes[0, index].set_title(titles[index], fontsize=8)
        for layer in range(layers):
            axis = axes[1 + layer, index]
            gray = image.mean(-1)
            axis.imshow(gray, cmap="gray", extent=(0, width, height, 0), vmin=0, vmax=255)
            shown = axis.imshow(
                shares[index, layer].numpy(),
                cmap="viridis",
                vmin=low,
                vmax=high,
                alpha=0.6,
                extent=(0, width, height, 0),
                interpolation="nearest",
            )
            axis.set_xticks(np.linspace(0, width, columns + 1), minor=True)
            axis.set_yticks(np.linspace(0, height, rows + 1), minor=True)
            axis.grid(which="minor", color="white", linewidth=0.4)
        if selection.macs is not None and selection.dense_macs:
            ratio = selection.macs[index].item() / selection.dense_macs
            axes[1, index].set_xlabel(f"{ratio:.2f} of dense MACs", fontsize=7)
        for axis in axes[:, index]:
            axis.tick_params(which="both", length=0, labelleft=False, labelbottom=False)
    if blocks is not None:
        for layer in range(layers):
            axes[1 + layer, 0].set_ylabel(f"block {layer}" if layer else "mean", fontsize=8)
    figure.colorbar(
        shown, ax=axes[1:, :].ravel().tolist(), label=meaning, shrink=0.9, aspect=10 + 10 * layers
    )
    save_figure(figure, path)


def draw_curves(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], x_label: str, path: str | Path
) -> None:
    """Draw curves over a common axis, each in a panel of its own.

    Args:
        x: Where the points lie.
        curves: Values of each curve by its label.
        x_label: What `x` is.
        path: Picture file to write; its folder is made.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(curves), figsize=(3.8 * len(curves), 3.0), squeeze=False, layout="constrained"
    )
    for axis, (label, values) in zip(axes[0], curves.items(), strict=True):
        axis.plot(x, values, marker="o")
        axis.set_xlabel(x_label)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def draw_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    path: str | Path,
) -> None:
    """Draw several lines into one panel.

    Args:
        lines: Points (x, y) of each line by its label.
        x_label: What x is.
        y_label: What y is.
        path: Picture file to write; its folder is made.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for label, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save_figure(figure, path)


def draw_ranges(
    curves: Mapping[str, Mapping[float, Sequence[float]]],
    x_label: str,
    y_label: str,
    path: str | Path,
) -> None:
    """Draw curves into one panel: the mean of several values at each place, and their range.

    Args:
        curves: For each curve by its label, the values at each x.
        x_label: What x is.
        y_label: What the values are.
        path: Picture file to write; its folder is made.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.6, 4.0), layout="constrained")
    for label, points in curves.items():
        places = sorted(points)
        means = [sum(points[x]) / len(points[x]) for x in places]
        axis.plot(places, means, marker="o", markersize=4, label=label)
        low, high = ([pick(points[x]) for x in places] for pick in (min, max))
        axis.fill_between(places, low, high, alpha=0.2)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save_figure(figure, path)


def draw_panels(
    labels: Sequence[str],
    axes: Mapping[str, Sequence[float]],
    values: Sequence[float],
    y_label: str,
    path: str | Path,
) -> None:
    """Draw the same values over several quantities, a panel for each; points of a label are joined.

    Args:
        labels: Label of each point.
        axes: For each panel by the label of its x axis, where the points lie.
        values: Height of each point.
        y_label: What the values are.
        path: Picture file to write; its folder is made.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(labels))
    colours: list[Any] = [plt.get_cmap("tab10")(number) for number in range(10)]
    colours += ["black", "gold", "navy", "lime", "salmon"]
    markers = "osD^vP*X<>"
    figure, panels = plt.subplots(
        1, len(axes), figsize=(4.4 * len(axes), 4.6), sharey=True, squeeze=False
    )
    for panel, (x_label, places) in zip(panels[0], axes.items()):
        for number, name in enumerate(names):
            points = sorted(
                (x, y) for label, x, y in zip(labels, places, values, strict=True) if label == name
            )
            panel.plot(
                *zip(*points),
                marker=markers[number % len(markers)],
                markersize=5,
                color=colours[number % len(colours)],
                label=name,
            )
        panel.set_xlabel(x_label)
        panel.grid(alpha=0.3)
        panel.set_xlim(left=0)
    panels[0, 0].set_ylabel(y_label)
    handles, texts = panels[0, 0].get_legend_handles_labels()
    lines = -(-len(names) // 4)
    figure.legend(handles, texts, loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.01 + 0.04 * lines, 1, 1))
    save_figure(figure, path)


def draw_looks(
    images: np.ndarray,
    titles: Sequence[str],
    looks: Mapping[str, tuple[PatchSelection, Sequence[str], Sequence[bool]]],
    path: str | Path,
) -> None:
    """Draw images, and below them what each of several models looked at: fine is bright, coarse dark.

    Args:
        images: Images as uint8 RGB.
        titles: What each image is.
        looks: For each model by its name its selection, its answers, and whether they are right.
        path: Picture file to write; its folder is made.

    Shape:
        images [B, H, W, 3].
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    count = len(images)
    figure, axes = plt.subplots(
        1 + len(looks),
        count,
        figsize=(1.15 * count + 1.9, 1.3 * (1 + len(looks))),
        squeeze=False,
        layout="constrained",
    )
    for index in range(count):
        axes[0, index].imshow(images[index], interpolation="nearest")
        axes[0, index].set_title(titles[index], fontsize=8)
    axes[0, 0].set_ylabel("image", fontsize=8, rotation=0, ha="right", va="center")
    for line, (name, (selection, answers, right)) in zip(axes[1:], looks.items()):
        line[0].set_ylabel(textwrap.fill(name, 14), fontsize=7, rotation=0, ha="right", va="center")
        height, width = selection.image_size
        light = selection.pixel_shares().numpy()[..., None]
        for index, axis in enumerate(line):
            image = np.asarray(
                torch.nn.functional.interpolate(
                    torch.from_numpy(images[index]).permute(2, 0, 1)[None].float(), (height, width)
                )[0].permute(1, 2, 0)
            )
            shown = image / 255 * (0.15 + 0.85 * light[index])
            axis.imshow(shown, interpolation="nearest")
            if not selection.tiles():
                for x0, y0, x1, y1 in selection.boxes[index][selection.order[index] >= 0].tolist():
                    box = Rectangle(
                        (x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor="w"
                    )
                    axis.add_patch(box)
            colour = "black" if right[index] else "#c00030"
            axis.set_title(answers[index], fontsize=7, color=colour, pad=2)
    for axis in axes.ravel():
        axis.tick_params(which="both", length=0, labelleft=False, labelbottom=False)
    save_figure(figure, path)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure of Matplotlib in one step and close it.

    Args:
        figure: The figure.
        path: Picture file to write, PNG without an ending; its folder is made.
    """
    from matplotlib import pyplot as plt

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=140, format=path.suffix.lstrip(".") or "png")
    plt.close(figure)
    write_safely(path, picture.getvalue())
