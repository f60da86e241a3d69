"""Which patches of some images matter to a model, and what is left with the best ones alone."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate
from torch import Tensor

from patchreg.models.selectors.rank import top_mask
from patchreg.models.selectors.rankers import scores_on_grid
from patchreg.pictures import add_model_arguments, check_out
from patchreg.runner.api import load
from patchreg.runner.patchrank import Ranker
from patchreg.runner.picture import plain_pipeline, read_samples
from patchreg.utils.draw import save_figure
from patchreg.utils.errors import ConfigError

HELP = {"ranks": "importance of the patches, and the image with the best ones alone"}


def add_arguments(kind: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        kind: "ranks".
        parser: Where to add them.
    """
    add_model_arguments(parser, "ranks.png", config_help="config of a model that ranks patches")
    parser.add_argument("--keep", type=int, help="patches to keep (default: half)")


def run(kind: str, arguments: argparse.Namespace) -> str:
    """Draw the picture and say where it is.

    Args:
        kind: "ranks".
        arguments: Parsed options.
    """
    check_out(arguments.out)
    if arguments.count < 1:
        raise ConfigError(f"--count {arguments.count}: expected at least 1")
    loaded = load(arguments.config, arguments.checkpoint)
    config, model = loaded.config, loaded.network
    images = plain_images(arguments.image, config, model, arguments.count)
    with torch.inference_mode():
        batch = dict(inputs=images)
        selection = Ranker(model).select(batch, images.float()).to("cpu")
    grid = selection.grid
    if grid is None:
        raise ConfigError(f"{type(model).__name__} chooses free boxes, not patches of a grid")
    patches = grid[0] * grid[1]
    keep = arguments.keep or patches // 2
    if not 1 <= keep <= patches:
        raise ConfigError(f"--keep {keep}: an image has {patches} patches")
    draw_ranks(images, scores_on_grid(selection, grid), grid, keep, arguments.out)
    return f"written to {arguments.out}"


def plain_images(source: str, config: Config, model: Any, count: int) -> Tensor:
    """Read images without augmentation, at the size a model was made for.

    Args:
        source: Image file, folder of images, or `test` for the config's test set.
        config: The model's config.
        model: The model; `img_size` of it or of its backbone is used, else the test pipeline as it is.
        count: How many images at most.

    Shape:
        Returns [B, 3, H, W] uint8.

    Raises:
        UserError: The images cannot be read.
    """
    config = copy.deepcopy(config)
    side = getattr(model, "img_size", None) or config.model.backbone.get("img_size")
    loader = config.get("test_dataloader") or config.get("train_dataloader")
    if loader is None:
        raise ConfigError(f"'{config.filename}' has no data, so nothing says how to read images")
    if side is not None:
        loader.dataset.pipeline = plain_pipeline(side)
    config.test_dataloader = loader
    return default_collate(read_samples(source, config, count))["inputs"]


def draw_ranks(
    images: Tensor, score: Tensor, grid: tuple[int, int], keep: int, path: str | Path
) -> None:
    """Draw images, their scores by rank, and the images with their best patches alone.

    Args:
        images: Images as uint8 RGB.
        score: Importance of the patches.
        grid: Rows and columns of patches.
        keep: How many are kept.
        path: Picture to write.

    Shape:
        images [B, 3, H, W]; score [B, rows * columns].
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count, (height, width) = len(images), images.shape[2:]
    kept = top_mask(score, keep).view(count, *grid)
    rank = score.argsort(dim=1).argsort(dim=1).view(count, *grid) / max(score.shape[1] - 1, 1)
    figure, axes = plt.subplots(
        3, count, figsize=(1.5 * count + 0.8, 5.0), squeeze=False, layout="constrained"
    )
    extent = (0, width, height, 0)
    for index in range(count):
        pixels = images[index].permute(1, 2, 0).numpy()
        mask = kept[index].numpy().repeat(height // grid[0], 0).repeat(width // grid[1], 1)
        alone = np.where(mask[..., None], pixels, np.uint8(255) - (255 - pixels) // 8)
        axes[0, index].imshow(pixels, extent=extent, interpolation="nearest")
        axes[1, index].imshow(pixels.mean(-1), cmap="gray", extent=extent, vmin=0, vmax=255)
        shown = axes[1, index].imshow(
            rank[index].numpy(), cmap="viridis", vmin=0, vmax=1, alpha=0.65, extent=extent
        )
        axes[2, index].imshow(alone, extent=extent, interpolation="nearest")
        for axis in axes[:, index]:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, label in zip(axes[:, 0], ("image", "rank", f"best {keep} of {score.shape[1]}")):
        axis.set_ylabel(label, fontsize=8)
    figure.colorbar(shown, ax=axes[1].tolist(), label="rank, 1 is best", shrink=0.9)
    save_figure(figure, path)
