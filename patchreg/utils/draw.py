"""Pictures of what a method looked at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from patchreg.structures import PatchSelection
from patchreg.utils.files import write_safely


def draw_selection(
    images: Tensor | np.ndarray,
    selection: PatchSelection,
    path: str | Path,
    titles: Sequence[str] = (),
    meaning: str = "share of full sampling",
) -> None:
    """Draw images and, below each, how finely each of its cells was looked at.

    Args:
        images: Images as uint8 RGB.
        selection: Selection over a grid for the same images.
        path: Picture file to write; its folder is made.
        titles: One title per image.
        meaning: What the colours stand for.

    Shape:
        images [B, H, W, 3].

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
    figure, axes = plt.subplots(
        2, count, figsize=(1.6 * count + 0.9, 3.7), squeeze=False, layout="constrained"
    )
    shares = selection.resolution.reshape(count, *selection.grid).cpu().numpy()
    low, high = float(shares.min()), float(shares.max())
    if low == high:
        low, high = 0.0, 1.0
    for index in range(count):
        image = np.asarray(images[index])
        top, bottom = axes[0, index], axes[1, index]
        top.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
        if index < len(titles):
            top.set_title(titles[index], fontsize=8)
        bottom.imshow(image.mean(-1), cmap="gray", extent=(0, width, height, 0), vmin=0, vmax=255)
        shown = bottom.imshow(
            shares[index],
            cmap="viridis",
            vmin=low,
            vmax=high,
            alpha=0.6,
            extent=(0, width, height, 0),
            interpolation="nearest",
        )
        rows, columns = selection.grid
        bottom.set_xticks(np.linspace(0, width, columns + 1), minor=True)
        bottom.set_yticks(np.linspace(0, height, rows + 1), minor=True)
        bottom.grid(which="minor", color="white", linewidth=0.4)
        ratio = ""
        if selection.macs is not None and selection.dense_macs:
            ratio = f"{selection.macs[index].item() / selection.dense_macs:.2f} of dense MACs"
        bottom.set_xlabel(ratio, fontsize=7)
        for axis in (top, bottom):
            axis.tick_params(which="both", length=0, labelleft=False, labelbottom=False)
    figure.colorbar(shown, ax=axes[1, :].tolist(), label=meaning, shrink=0.9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=140, format=path.suffix.lstrip(".") or "png")
    plt.close(figure)
    write_safely(path, picture.getvalue())
