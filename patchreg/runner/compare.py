"""Several trained models on the same images and machine: accuracy, cost and speed in one table."""

from __future__ import annotations

import copy
import csv
import io
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from torch import Tensor

from patchreg.runner.api import load_model
from patchreg.runner.build import EngineRunner, config_errors, load_config, resolve_checkpoint
from patchreg.utils.errors import ConfigError
from patchreg.utils.files import write_safely


@dataclass
class Entry:
    """One row of a comparison.

    Args:
        label: Name in the table.
        config: Config file.
        checkpoint: Checkpoint, or folder of a run for its newest one.
        options: Overrides by dotted key.
    """

    label: str
    config: str
    checkpoint: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """Figures of one entry.

    Args:
        label: Name in the table.
        top1: Accuracy in percent.
        images: Test images.
        macs: Mean multiply-accumulates executed per image.
        mac_ratio: The same relative to the model's dense twin.
        images_per_second: From the median time of a batch.
        speed: Median over rounds of (time of the first entry / time of this one).
        same_as: Earlier entry with the same weights, or an empty text.
        same_predictions: Images on which both predict the same class, or None.
    """

    label: str
    top1: float
    images: int
    macs: float
    mac_ratio: float
    images_per_second: float = 0.0
    speed: float = 1.0
    same_as: str = ""
    same_predictions: int | None = None


def compare(
    entries: Sequence[Entry], rounds: int = 15, batch_size: int = 128
) -> tuple[list[Row], str]:
    """Evaluate all entries on the test set of the first one and time them in turn.

    Args:
        entries: At least one entry; all must read the same test set.
        rounds: Timed rounds; in each, every model runs the same batch once.
        batch_size: Images per timed batch.

    Returns:
        The rows, and one line about how they were measured.

    Raises:
        ConfigError: Nothing to compare, or the test sets differ.
    """
    if not entries:
        raise ConfigError("nothing to compare: name at least one run")
    configs = [load_config(entry.config, entry.options) for entry in entries]
    models = [load_model(config, entry.checkpoint) for config, entry in zip(configs, entries)]
    loader_config = configs[0].get("test_dataloader")
    if loader_config is None:
        raise ConfigError(f"'{entries[0].config}' has no test_dataloader to compare on")
    for config, entry in zip(configs, entries):
        if config.test_dataloader.dataset != loader_config.dataset:
            raise ConfigError(
                f"'{entry.label}' ({entry.config}) is tested on another data set than '{entries[0].label}'"
            )
    with config_errors("the test data cannot be read"):
        loader = EngineRunner.build_dataloader(loader_config, seed=0)
    predictions: list[list[Tensor]] = [[] for _ in entries]
    costs = [0.0] * len(entries)
    dense = [1.0] * len(entries)
    labels = []
    timed: Any = None
    with torch.inference_mode():
        for batch in loader:
            if timed is None:
                timed = batch
            for index, model in enumerate(models):
                samples = model.test_step(copy.deepcopy(batch))
                predictions[index].append(torch.cat([item.pred_label for item in samples]).cpu())
                costs[index] += sum(item.macs for item in samples)
                dense[index] = samples[0].dense_macs
            labels.append(torch.cat([item.gt_label for item in batch["data_samples"]]).cpu())
        times = _time(models, timed, rounds, batch_size)
    truth = torch.cat(labels)
    rows: list[Row] = []
    for index, entry in enumerate(entries):
        predicted = torch.cat(predictions[index])
        row = Row(
            label=entry.label,
            top1=100.0 * (predicted == truth).double().mean().item(),
            images=len(truth),
            macs=costs[index] / len(truth),
            mac_ratio=costs[index] / len(truth) / dense[index],
            images_per_second=times[index][0] / statistics.median(times[index][1]),
            speed=statistics.median(a / b for a, b in zip(times[0][1], times[index][1])),
        )
        for earlier in range(index):
            same = resolve_checkpoint(entries[earlier].checkpoint) == resolve_checkpoint(
                entry.checkpoint
            )
            if same and entries[earlier].config == entry.config:
                row.same_as = entries[earlier].label
                row.same_predictions = int((torch.cat(predictions[earlier]) == predicted).sum())
        rows.append(row)
    how = (
        f"{len(truth)} test images; speed: {rounds} rounds over one batch of {times[0][0]} images, "
        f"models in turn, "
        f"{get_device()}, {torch.get_num_threads()} threads, float32, torch {torch.__version__}"
    )
    return rows, how


def _time(
    models: Sequence[Any], batch: Any, rounds: int, batch_size: int
) -> list[tuple[int, list[float]]]:
    """Time the models in turn on one preprocessed batch; return (images, seconds per round) of each."""
    inputs = []
    for model in models:
        images = model.data_preprocessor(copy.deepcopy(batch), False)["inputs"]
        repeats = -(-batch_size // len(images))
        inputs.append(images.repeat(repeats, 1, 1, 1)[:batch_size])
    seconds: list[list[float]] = [[] for _ in models]
    for number in range(rounds + 2):
        for index, model in enumerate(models):
            if inputs[index].is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            model(inputs[index])
            if inputs[index].is_cuda:
                torch.cuda.synchronize()
            if number >= 2:
                seconds[index].append(time.perf_counter() - start)
    return [(len(images), times) for images, times in zip(inputs, seconds)]


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text.

    Args:
        rows: What `compare` returned.
    """
    width = max(len(row.label) for row in rows)
    lines = [f"{'':{width}s}   top-1    MACs/image   of dense   images/s   speed"]
    for row in rows:
        lines.append(
            f"{row.label:{width}s}  {row.top1:6.2f}  {row.macs / 1e6:9.1f} M  {row.mac_ratio:8.3f}  "
            f"{row.images_per_second:9.0f}  {row.speed:5.2f}x"
        )
    for row in rows:
        if row.same_predictions is not None:
            lines.append(
                f"'{row.label}' predicts as '{row.same_as}' on {row.same_predictions} of {row.images} images"
            )
    return "\n".join(lines)


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """Write the rows as CSV.

    Args:
        rows: What `compare` returned.
        path: File; its folder is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_safely(path, text.getvalue().encode())
