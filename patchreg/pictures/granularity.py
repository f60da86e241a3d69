"""How finely each region of some images is looked at, and by which block."""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
from mmengine.dataset import default_collate

from patchreg.pictures import add_model_arguments, check_out
from patchreg.runner.api import load
from patchreg.runner.picture import model_classes, read_samples
from patchreg.utils.draw import draw_selection
from patchreg.utils.errors import ConfigError

HELP = {"granularity": "how finely each region is queried"}


def add_arguments(kind: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        kind: "granularity".
        parser: Where to add them.
    """
    add_model_arguments(parser, "granularity.png")


def run(kind: str, arguments: argparse.Namespace) -> str:
    """Draw the picture and say where it is.

    Args:
        kind: "granularity".
        arguments: Parsed options.
    """
    draw_granularity(
        arguments.image, arguments.config, arguments.checkpoint, arguments.out, arguments.count
    )
    return f"written to {arguments.out}"


def draw_granularity(
    source: str, path: str, checkpoint: str | None, out: str, count: int = 8
) -> None:
    """Draw how finely each region of some images is looked at, and by which block.

    Args:
        source: Image file, folder of images, or `test` for the config's test set.
        path: Config file.
        checkpoint: Checkpoint, folder of a run for its newest one, or None for the one that ships.
        out: Picture to write.
        count: How many images at most.

    Raises:
        UserError: An input is missing or cannot be read.
    """
    if count < 1:
        raise ConfigError(f"--count {count}: expected at least 1")
    check_out(out)
    loaded = load(path, checkpoint)
    config, model = loaded.config, loaded.network
    samples = read_samples(source, config, count)
    batch = default_collate(samples)
    images = batch["inputs"].permute(0, 2, 3, 1).numpy().astype(np.uint8)
    with torch.inference_mode():
        data = model.data_preprocessor(copy.deepcopy(batch), False)
        selection = model.select(data["inputs"]).to("cpu")
        # Models that do not choose block by block have no such method.
        by_block = getattr(model, "block_shares", lambda inputs: None)(data["inputs"])
        predicted = model(data["inputs"]).argmax(1).tolist()
    classes = model_classes(config)
    titles = [classes[label] if label < len(classes) else str(label) for label in predicted]
    draw_selection(images, selection, out, titles, blocks=by_block)
