"""What the policy saw, how probable each patch was, and what the classifier got."""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
from mmengine.dataset import default_collate

from patchreg.methods.patchdrop.mask import expand_actions
from patchreg.methods.patchdrop.model import PatchDropClassifier
from patchreg.pictures import add_model_arguments, check_out
from patchreg.runner.api import load
from patchreg.runner.picture import model_classes, read_samples
from patchreg.utils.draw import save_figure
from patchreg.utils.errors import ConfigError

HELP = {"policy": "which patches PatchDrop acquires: image, overview, probabilities, kept patches"}


def add_arguments(kind: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        kind: "policy".
        parser: Where to add them.
    """
    add_model_arguments(parser, "policy.png")


def run(kind: str, arguments: argparse.Namespace) -> str:
    """Draw the picture and say where it is.

    Args:
        kind: "policy".
        arguments: Parsed options.
    """
    draw_policy(
        arguments.image, arguments.config, arguments.checkpoint, arguments.out, arguments.count
    )
    return f"written to {arguments.out}"


def draw_policy(source: str, path: str, checkpoint: str | None, out: str, count: int = 8) -> None:
    """Draw images, overviews, probabilities and what was acquired.

    Args:
        source: Image file, folder of images, or `test` for the config's test set.
        path: Config file of a policy.
        checkpoint: Checkpoint, folder of a run for its newest one, or None for the one that ships.
        out: Picture to write.
        count: How many images at most.

    Raises:
        ConfigError: The model has no policy, or an option cannot be used.
    """
    if count < 1:
        raise ConfigError(f"--count {count}: expected at least 1")
    check_out(out)
    loaded = load(path, checkpoint)
    config, model = loaded.config, loaded.network
    if not isinstance(model, PatchDropClassifier):
        raise ConfigError(f"'{path}' has no policy; give a config of stage 1 to 3 of PatchDrop")
    samples = read_samples(source, config, count)
    batch = default_collate(samples)
    images = batch["inputs"].permute(0, 2, 3, 1).numpy().astype(np.uint8)
    with torch.inference_mode():
        inputs = model.data_preprocessor(copy.deepcopy(batch), False)["inputs"]
        result = model.run(inputs)
        view = model.overview(batch["inputs"].float())
    size = (images.shape[1], images.shape[2])
    kept = expand_actions(result.actions.float().cpu(), size, model.grid, model.patch_size)
    mean = model.data_preprocessor.mean.view(3).cpu().numpy()
    erased = np.where(kept[:, 0, :, :, None].bool().numpy(), images, mean.astype(np.uint8))
    classes = model_classes(config)
    titles = [
        classes[label] if label < len(classes) else str(label)
        for label in result.logits.argmax(1).tolist()
    ]
    rows = {
        "image": images,
        "overview": view.permute(0, 2, 3, 1).numpy().astype(np.uint8),
        "probability": result.probability.cpu().view(-1, *model.grid).numpy(),
        "acquired": erased,
    }
    counts = result.actions.sum(1).tolist()
    _draw(rows, [f"{n} of {result.actions.shape[1]}" for n in counts], titles, out)


def _draw(rows: dict[str, np.ndarray], notes: list[str], titles: list[str], out: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = len(titles)
    figure, axes = plt.subplots(
        len(rows), count, figsize=(1.5 * count + 0.9, 6.4), squeeze=False, layout="constrained"
    )
    for row, (name, pictures) in enumerate(rows.items()):
        for column in range(count):
            axis = axes[row, column]
            colours = dict(cmap="viridis", vmin=0, vmax=1) if name == "probability" else {}
            shown = axis.imshow(pictures[column], interpolation="nearest", **colours)
            axis.set_xticks([])
            axis.set_yticks([])
            if name == "probability":
                for (y, x), value in np.ndenumerate(pictures[column]):
                    dark = value < 0.6
                    axis.text(
                        x,
                        y,
                        f"{value:.2f}"[1:] if value < 0.995 else "1",
                        ha="center",
                        va="center",
                        fontsize=6,
                        color="white" if dark else "black",
                    )
        axes[row, 0].set_ylabel(name, fontsize=9)
        if name == "probability":
            figure.colorbar(shown, ax=axes[row, :].tolist(), shrink=0.8, aspect=12)
    for column in range(count):
        axes[0, column].set_title(titles[column], fontsize=8)
        axes[-1, column].set_xlabel(notes[column], fontsize=8)
    save_figure(figure, out)
