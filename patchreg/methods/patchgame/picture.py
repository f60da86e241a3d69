"""Atlas of the symbols: patches that the speaker gives the same name."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchreg.methods.patchgame.model import PatchGamePretrainer
from patchreg.pictures import add_checkpoint_argument, check_out
from patchreg.pictures.ranks import plain_images
from patchreg.runner.api import load
from patchreg.utils.draw import save_figure
from patchreg.utils.errors import ConfigError

HELP = {"symbols": "patches to which PatchGame's speaker gives the same symbol"}
BATCH = 128


def add_arguments(kind: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        kind: "symbols".
        parser: Where to add them.
    """
    parser.add_argument("image", help="folder of images, image file, or 'test' for the test set")
    parser.add_argument("config", help="config of a PatchGame")
    add_checkpoint_argument(parser)
    parser.add_argument("--out", default="symbols.png", help="picture to write")
    parser.add_argument("--count", type=int, default=512, help="images at most (default 512)")
    parser.add_argument("--symbols", type=int, default=20, help="most frequent ones (default 20)")
    parser.add_argument("--patches", type=int, default=16, help="of each symbol (default 16)")


def run(kind: str, arguments: argparse.Namespace) -> str:
    """Draw the picture; return how the symbols are used and where it is.

    Args:
        kind: "symbols".
        arguments: Parsed options.

    Raises:
        ConfigError: A number is below 1, or the model is another one.
    """
    check_out(arguments.out)
    for name in ("count", "symbols", "patches"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} {getattr(arguments, name)}: expected at least 1")
    loaded = load(arguments.config, arguments.checkpoint)
    config, model = loaded.config, loaded.network
    if not isinstance(model, PatchGamePretrainer):
        raise ConfigError(f"'{arguments.config}' is no PatchGame but a {type(model).__name__}")
    images = plain_images(arguments.image, config, model, arguments.count)
    used, perplexity = draw_symbols(
        model, images, arguments.out, arguments.symbols, arguments.patches
    )
    return (
        f"{len(images)} images: {used} of {model.gumbel.shape[1]} symbols used, perplexity "
        f"{perplexity:.1f}\nwritten to {arguments.out}"
    )


@torch.no_grad()
def draw_symbols(
    model: PatchGamePretrainer, images: Tensor, path: str | Path, symbols: int, patches: int
) -> tuple[int, float]:
    """Draw a row of patches for each of the most frequent symbols, the surest first.

    Args:
        model: The model, in evaluation mode.
        images: Images as uint8 RGB.
        path: Picture to write.
        symbols: How many symbols.
        patches: Patches of each.

    Returns:
        How many symbols are used at all, and the perplexity of their distribution.

    Shape:
        images [B, 3, H, W].
    """
    side, found, sure, cut = model.patch_size, [], [], []
    for part in images.split(BATCH):
        inputs = model.data_preprocessor(dict(inputs=part), False)["inputs"]
        logits, _ = model.gumbel(model.sender.embed(inputs)[0])
        # Of several symbols per patch the first one is shown.
        probability = logits.unflatten(-1, model.gumbel.shape)[:, :, 0].float().softmax(-1).cpu()
        best = probability.max(dim=-1)
        found.append(best.indices.flatten())
        sure.append(best.values.flatten())
        tiles = F.unfold(part.float(), side, stride=side).transpose(1, 2)
        cut.append(tiles.reshape(-1, 3, side, side).byte())
    name, trust, tiles = torch.cat(found), torch.cat(sure), torch.cat(cut)
    counts = torch.bincount(name, minlength=model.gumbel.shape[1])
    share = counts.double() / counts.sum()
    perplexity = math.exp(-float(torch.special.xlogy(share, share).sum()))
    frequent = [int(item) for item in counts.argsort(descending=True)[:symbols] if counts[item]]
    _draw(tiles, name, trust, counts, frequent, patches, path)
    return int((counts > 0).sum()), perplexity


def _draw(
    tiles: Tensor,
    name: Tensor,
    trust: Tensor,
    counts: Tensor,
    frequent: list[int],
    patches: int,
    path: str | Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    side = tiles.shape[-1]
    gap = max(1, side // 8)
    step = side + gap
    canvas = np.full((step * len(frequent) - gap, step * patches - gap, 3), 255, dtype=np.uint8)
    for row, symbol in enumerate(frequent):
        mine = (name == symbol).nonzero().flatten()
        mine = mine[trust[mine].argsort(descending=True)][:patches]
        for column, index in enumerate(mine.tolist()):
            tile = tiles[index].permute(1, 2, 0).numpy()
            canvas[row * step : row * step + side, column * step : column * step + side] = tile
    height = 0.3 * len(frequent) + 0.4
    figure, axis = plt.subplots(figsize=(0.3 * patches + 1.6, height), layout="constrained")
    axis.imshow(canvas, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([row * step + side / 2 for row in range(len(frequent))])
    total = int(counts.sum())
    labels = [f"{symbol} ({100 * int(counts[symbol]) / total:.1f} %)" for symbol in frequent]
    axis.set_yticklabels(labels, fontsize=7)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    save_figure(figure, path)
