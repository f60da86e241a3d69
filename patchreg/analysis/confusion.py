"""Which classes a classifier takes for which."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchreg.runner.api import load
from patchreg.runner.build import EngineRunner, config_errors
from patchreg.utils.draw import save_figure
from patchreg.utils.errors import ConfigError, DataError
from patchreg.utils.files import write_safely
from patchreg.utils.tables import text_table

HELP = "confusion matrix on the test set: CSV, picture, most confused pairs, accuracy per class"

_SHOWN = 40
"""Classes that a picture can name; of more, those with the most mistakes are drawn."""


@dataclass(eq=False)
class Confusion:
    """How often each class was taken for each.

    Args:
        counts: Images by true class (row) and predicted class (column).
        names: One name per class.

    Shape:
        counts [K, K] int64.
    """

    counts: np.ndarray
    names: list[str]

    @property
    def accuracy(self) -> float:
        """Share of all images that are right, in percent."""
        return 100.0 * float(np.trace(self.counts)) / max(int(self.counts.sum()), 1)

    def by_class(self) -> list[tuple[str, int, float, float]]:
        """Return name, images, recall and precision (in percent, NaN of nothing) of each class."""
        images, answers = self.counts.sum(1), self.counts.sum(0)
        right = np.diag(self.counts)
        with np.errstate(invalid="ignore"):
            recall, precision = 100.0 * right / images, 100.0 * right / answers
        return [
            (name, int(images[k]), float(recall[k]), float(precision[k]))
            for k, name in enumerate(self.names)
        ]

    def pairs(self, count: int) -> list[tuple[str, str, int, float]]:
        """Return the most confused pairs: true class, predicted class, images, percent of the true class.

        Args:
            count: How many at most; pairs that never occur are left out.
        """
        images = self.counts.sum(1)
        found = []
        for true, predicted in self.confused()[:count]:
            times = int(self.counts[true, predicted])
            share = 100.0 * times / int(images[true])
            found.append((self.names[true], self.names[predicted], times, share))
        return found

    def confused(self) -> np.ndarray:
        """Return true and predicted class of every kind of mistake, the most frequent first.

        Shape:
            Returns [N, 2].
        """
        wrong = self.counts - np.diag(np.diag(self.counts))
        order = np.argsort(-wrong, axis=None, kind="stable")[: np.count_nonzero(wrong)]
        return np.stack(np.unravel_index(order, wrong.shape), axis=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        parser: Where to add them.
    """
    parser.add_argument("config", help="config of a classifier, e.g. configs/dge/quick.py")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="checkpoint, or folder of a run for its newest one (default: the one that ships)",
    )
    parser.add_argument(
        "--out", default="work_dirs/confusion", help="folder of confusion.csv and confusion.png"
    )
    parser.add_argument(
        "--top", type=int, default=10, help="pairs and classes to print (default 10)"
    )


def run(arguments: argparse.Namespace) -> str:
    """Write matrix and picture; return accuracies and the most confused pairs.

    Args:
        arguments: Parsed options.
    """
    if arguments.top < 1:
        raise ConfigError(f"--top {arguments.top}: expected at least 1")
    found = confusion_of(arguments.config, arguments.checkpoint)
    folder = Path(arguments.out)
    write_csv(found, folder / "confusion.csv")
    draw(found, folder / "confusion.png")
    return report(found, arguments.top) + f"\nwritten to {folder}: confusion.csv, confusion.png"


def confusion_of(path: str, checkpoint: str | None = None) -> Confusion:
    """Predict the test set of a config and count.

    Args:
        path: Config file.
        checkpoint: Checkpoint, or folder of a run for its newest one; None takes the one that ships
            with the config, else what the config itself names.

    Raises:
        ConfigError: The config has no test set, or its model does not classify.
        DataError: The test set has no labels, or other classes than the model was trained for.
    """
    model = load(path, checkpoint)
    if model.config.get("test_dataloader") is None:
        raise ConfigError(
            f"'{path}' has no test_dataloader; use the config of a stage that has one"
        )
    with config_errors("the test data cannot be read"):
        loader = EngineRunner.build_dataloader(model.config.test_dataloader, seed=0)
    names = list(getattr(loader.dataset, "metainfo", {}).get("classes") or ())
    if names and model.classes and names != model.classes:
        raise DataError(
            f"the model was trained for {', '.join(model.classes[:3])}, ..., but the test set here has "
            f"{', '.join(names[:3])}, ...; prepare the data of '{path}' with tools/prepare_data.py"
        )
    return count_mistakes(model.network, loader, names)


@torch.inference_mode()
def count_mistakes(model: Any, loader: Any, names: Sequence[str] = ()) -> Confusion:
    """Predict all batches of a loader and count.

    Args:
        model: Object whose `test_step(batch)` returns samples with `pred_label`.
        loader: Batches with `data_samples` that have `gt_label`.
        names: Class names; classes without one are called by their number.

    Raises:
        ConfigError: The model gives no classes.
        DataError: An image has no label, or several.
    """
    pairs: list[tuple[int, int]] = []
    classes = len(names)
    for batch in loader:
        samples = batch.get("data_samples") if isinstance(batch, dict) else None
        labels = [item.get("gt_label") for item in samples or ()]
        if not labels or any(label is None or label.numel() != 1 for label in labels):
            raise DataError(
                "the test set has no single label per image, so nothing can be confused"
            )
        # The model may move or change the samples.
        truth = [int(label) for label in labels]
        for true, answer in zip(truth, model.test_step(batch), strict=True):
            if "pred_label" not in answer:
                raise ConfigError(
                    f"{type(model).__name__} gives features, not classes; use the config of a classifier"
                )
            if "pred_score" in answer:
                classes = max(classes, len(answer.pred_score))
            pairs.append((true, int(answer.pred_label)))
    classes = max([classes, *(1 + max(pair) for pair in pairs)])
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, tuple(np.array(pairs).T), 1)
    full = [str(names[k]) if k < len(names) else str(k) for k in range(classes)]
    return Confusion(counts, [_short(name) for name in full])


def _short(name: str) -> str:
    # ImageNet's names are lists of synonyms.
    name = name.split(",")[0]
    return name if len(name) <= 24 else name[:21] + "..."


def report(found: Confusion, top: int) -> str:
    """Return accuracies and the most confused pairs as text.

    Args:
        found: The counts.
        top: How many classes and pairs at most.
    """
    total = int(found.counts.sum())
    lines = [f"top-1 {found.accuracy:.2f} % of {total} images, {len(found.names)} classes", ""]
    classes = sorted(found.by_class(), key=lambda one: (one[2] != one[2], one[2]))
    rows = [
        (name, str(images), f"{recall:.1f}", f"{precision:.1f}")
        for name, images, recall, precision in classes[:top]
    ]
    weakest = "class" if len(classes) <= top else f"class ({top} weakest)"
    lines += [text_table((weakest, "images", "accuracy %", "precision %"), rows), ""]
    pairs = [
        (true, predicted, str(times), f"{share:.1f}")
        for true, predicted, times, share in found.pairs(top)
    ]
    header = ("most confused", "taken for", "images", "% of the class")
    lines.append(text_table(header, pairs, left=2) if pairs else "no mistakes")
    return "\n".join(lines)


def write_csv(found: Confusion, path: str | Path) -> None:
    """Write the counts with the names: one row per true class.

    Args:
        found: The counts.
        path: File; its folder is made.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true \\ predicted", *found.names])
    for name, row in zip(found.names, found.counts.tolist(), strict=True):
        writer.writerow([name, *row])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safely(path, text.getvalue().encode())


def draw(found: Confusion, path: str | Path) -> None:
    """Draw the shares of each true class; of many classes those with the most mistakes.

    Args:
        found: The counts.
        path: Picture file to write; its folder is made.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    counts, names = found.counts, found.names
    shares = 100.0 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    title = f"top-1 {found.accuracy:.2f} % of {int(counts.sum())} images"
    if len(names) > _SHOWN:
        # The classes of the first mistakes, as many as fit.
        worst = np.sort(np.array(list(dict.fromkeys(found.confused().flat))[:_SHOWN], dtype=int))
        shares, names = shares[np.ix_(worst, worst)], [names[k] for k in worst]
        title += f"; {len(worst)} of {len(found.names)} classes: those of the most confused pairs"
    size = len(names)
    side = max(4.6, 0.24 * size if size > 14 else 0.52 * size)
    figure, axis = plt.subplots(figsize=(side + 1.8, side + 0.9), layout="constrained")
    shown = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    fontsize = 10 if size <= 14 else 7
    if size <= 14:
        for (row, column), share in np.ndenumerate(shares):
            if share > 0:
                axis.text(
                    column,
                    row,
                    f"{share:.0f}" if share >= 1 else "<1",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if share > 55 else "black",
                )
    axis.set_xticks(range(size), names, rotation=60 if size <= 14 else 90, fontsize=fontsize)
    if size <= 14:
        for label in axis.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axis.set_yticks(range(size), names, fontsize=fontsize)
    axis.set_xlabel("predicted class", fontsize=11)
    axis.set_ylabel("true class", fontsize=11)
    axis.set_title(title, fontsize=11)
    figure.colorbar(shown, ax=axis, label="% of the images of the true class", shrink=0.8)
    save_figure(figure, path)
