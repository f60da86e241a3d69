"""Trained models on the same images and machine: accuracy, cost, pixels looked at and speed in one table."""

from __future__ import annotations

import ast
import copy
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.device import get_device
from torch import Tensor

from patchreg.runner.api import load_model, shipped_checkpoint
from patchreg.runner.build import EngineRunner, config_errors, load_config, resolve_checkpoint
from patchreg.structures import PatchSelection
from patchreg.utils import tables
from patchreg.utils.errors import ConfigError

BUDGET = "budget"
"""Knob of models that have `set_budget`: mean multiply-accumulates per image."""
ROUNDS, BATCH = 15, 128
"""Timed rounds, and images of the batch that is timed, unless told otherwise."""
SEEN = 512
"""Images of which the sampled pixels are measured."""
SHOWN = 8
"""Images whose selections are kept for a picture."""


@dataclass
class Entry:
    """One model of a comparison, at one setting or at several of one knob.

    Args:
        label: Name in the table.
        config: Config file.
        checkpoint: Checkpoint, or folder of a run for its newest one; None for a model that loads its parts by
            itself.
        options: Overrides by dotted key; `budget` goes to the model's `set_budget`.
        knob: Option that `values` are for, or None.
        values: Settings of the knob, each a row.
    """

    label: str
    config: str
    checkpoint: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    knob: str | None = None
    values: Sequence[Any] = ()

    def points(self) -> list[Entry]:
        """Return an entry per setting."""
        if self.knob is None:
            return [self]
        if not self.values:
            raise ConfigError(f"'{self.label}': the knob '{self.knob}' has no values")
        return [
            replace(self, options={**self.options, self.knob: value}, values=(value,))
            for value in self.values
        ]

    def command(self) -> str:
        """Return what to type for this row alone."""
        words = [f"{key}={value}".replace(" ", "") for key, value in self.options.items()]
        parts = [self.label, self.config, self.checkpoint or "-", *words]
        return "python tools/compare.py --run " + " ".join(shlex.quote(part) for part in parts)


@dataclass
class Row:
    """Figures of one model at one setting.

    Args:
        label: Name in the table.
        value: Setting of the knob, or an empty text.
        top1: Accuracy in percent.
        images: Test images.
        macs: Mean multiply-accumulates executed per image.
        mac_ratio: The same relative to the model's dense twin.
        seen: Mean share of the pixels sampled, over the first `SEEN` images.
        images_per_second: From the median time of a batch.
        speed: Median over rounds of (time of the first row / time of this one).
        best: Nothing in the table is both more accurate and as fast.
        same_as: Earlier row with the same weights, or an empty text.
        same_predictions: Images on which both predict the same class, or None.
        command: What to type for this row alone.
    """

    label: str
    value: Any
    top1: float
    images: int
    macs: float
    mac_ratio: float
    seen: float
    images_per_second: float = 0.0
    speed: float = 1.0
    best: bool = False
    same_as: str = ""
    same_predictions: int | None = None
    command: str = ""

    @property
    def name(self) -> str:
        """Label and setting."""
        return f"{self.label} {_short(self.value)}" if self.value != "" else self.label

    @property
    def milliseconds(self) -> float:
        """Time of an image in a batch, in ms."""
        return 1000 / self.images_per_second if self.images_per_second else float("nan")


@dataclass(eq=False)
class Look:
    """What a model looked at in some images.

    Args:
        name: Label and setting.
        selection: Its selection.
        predicted: Its classes.

    Shape:
        predicted [n] int64.
    """

    name: str
    selection: PatchSelection
    predicted: Tensor


@dataclass(eq=False)
class Comparison:
    """What `compare` found.

    Args:
        rows: A row per model and setting.
        how: One line about how it was measured.
        images: Some test images, uint8 RGB.
        truth: Their labels.
        classes: Names of the classes, or nothing.
        looks: What each model looked at there, at the middle setting of its knob.

    Shape:
        images [n, H, W, 3]; truth [n].
    """

    rows: list[Row]
    how: str
    images: np.ndarray
    truth: Tensor
    classes: list[str]
    looks: list[Look]


def declared(folder: str | Path = "configs") -> list[Entry]:
    """Return the entries that configs declare: those with a `compare` of their own.

    `compare = dict(label=..., checkpoint=..., knob=..., values=..., order=...)`; without `checkpoint` the model
    loads its parts by itself; `order` sorts.

    Args:
        folder: Folder with one folder of configs per method.

    Raises:
        ConfigError: No config declares anything.
    """
    found = []
    for path in sorted(Path(folder).glob("*/*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "compare":
                config = load_config(path, moved={"work_dirs": "work_dirs"})
                found.append((config.compare.get("order", 50), _entry(path, config.compare)))
    if not found:
        raise ConfigError(f"no config in '{folder}' says compare=dict(label=...); use --run")
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


def _entry(path: Path, said: Mapping[str, Any]) -> Entry:
    return Entry(
        label=said["label"],
        config=str(path),
        checkpoint=said.get("checkpoint") or shipped_checkpoint(path),
        knob=said.get("knob"),
        values=tuple(said.get("values", ())),
    )


def _load(entry: Entry) -> tuple[Any, Any]:
    """Return config and model of one setting."""
    options = dict(entry.options)
    budget = options.pop(BUDGET, None)
    if entry.checkpoint is not None:
        # The named checkpoint takes the place of the one that the config would load.
        options.setdefault("load_from", resolve_checkpoint(entry.checkpoint))
    # Files of earlier stages are not needed beside a whole checkpoint.
    config = load_config(entry.config, options, moved={"work_dirs": "work_dirs"})
    if config.get("test_dataloader") is None or "model" not in config:
        raise ConfigError(f"'{entry.config}' has no model with a test_dataloader to compare on")
    model = load_model(config, entry.checkpoint)
    if budget is not None:
        if not hasattr(model, "set_budget"):
            raise ConfigError(f"'{entry.label}': {type(model).__name__} has no budget to set")
        model.set_budget(float(budget), resolve_checkpoint(entry.checkpoint or ""))
    return config, model


def compare(
    entries: Sequence[Entry],
    rounds: int = ROUNDS,
    batch_size: int = BATCH,
    images: int | None = None,
) -> Comparison:
    """Evaluate all entries on the test set of the first one and time them in turn.

    Args:
        entries: At least one entry; all must read the same test set.
        rounds: Timed rounds; in each, every model runs the same batch once.
        batch_size: Images per timed batch.
        images: Test images, the same share of every class; None for all.

    Raises:
        ConfigError: Nothing to compare, or the test sets differ.
    """
    for name, value in (("rounds", rounds), ("batch size", batch_size), ("images", images)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: expected at least 1")
    settings = [
        f"--{name} {value}"
        for name, value, usual in (
            ("rounds", rounds, ROUNDS),
            ("batch-size", batch_size, BATCH),
            ("images", images, None),
        )
        if value != usual
    ]
    points = [point for entry in entries for point in entry.points()]
    if not points:
        raise ConfigError("nothing to compare: name at least one run")
    loaded = [_load(point) for point in points]
    models = [model for _, model in loaded]
    loader_config = copy.deepcopy(loaded[0][0].test_dataloader)
    for (config, _), point in zip(loaded, points):
        if config.test_dataloader.dataset != loader_config.dataset:
            raise ConfigError(
                f"'{point.label}' ({point.config}) is tested on another data set than '{points[0].label}'"
            )
    if images is not None:
        loader_config.dataset["subset"] = images
    with config_errors("the test data cannot be read"):
        loader = EngineRunner.build_dataloader(loader_config, seed=0)
    predictions: list[list[Tensor]] = [[] for _ in points]
    costs = [0.0] * len(points)
    dense = [1.0] * len(points)
    seen: list[list[Tensor]] = [[] for _ in points]
    looks: list[PatchSelection | None] = [None] * len(points)
    labels: list[Tensor] = []
    timed: Any = None
    with torch.inference_mode():
        for batch in loader:
            timed = batch if timed is None else timed
            count = sum(len(part) for part in labels)
            for index, model in enumerate(models):
                samples = model.test_step(copy.deepcopy(batch))
                predictions[index].append(torch.cat([item.pred_label for item in samples]).cpu())
                costs[index] += sum(item.macs for item in samples)
                dense[index] = samples[0].dense_macs
                if count < SEEN:
                    data = model.data_preprocessor(copy.deepcopy(batch), False)
                    selection = model.select(data["inputs"])
                    seen[index].append(selection.sampled_share()[: SEEN - count].cpu())
                    if looks[index] is None:
                        looks[index] = selection[:SHOWN].to("cpu")
            labels.append(torch.cat([item.gt_label for item in batch["data_samples"]]).cpu())
        times = _time(models, timed, rounds, batch_size)
    truth = torch.cat(labels)
    rows: list[Row] = []
    for index, point in enumerate(points):
        predicted = torch.cat(predictions[index])
        row = Row(
            label=point.label,
            value="" if point.knob is None else point.options[point.knob],
            top1=100.0 * (predicted == truth).double().mean().item(),
            images=len(truth),
            macs=costs[index] / len(truth),
            mac_ratio=costs[index] / len(truth) / dense[index],
            seen=float(torch.cat(seen[index]).mean()),
            images_per_second=times[index][0] / statistics.median(times[index][1]),
            speed=statistics.median(a / b for a, b in zip(times[0][1], times[index][1])),
            command=" ".join([point.command(), *settings]),
        )
        for earlier in range(index):
            other = points[earlier]
            if (
                point.knob
                or other.knob
                or (point.config, point.checkpoint)
                != (
                    other.config,
                    other.checkpoint,
                )
            ):
                continue
            row.same_as = other.label
            row.same_predictions = int((torch.cat(predictions[earlier]) == predicted).sum())
        rows.append(row)
    for row in rows:
        row.best = not any(
            other.top1 > row.top1 and other.images_per_second >= row.images_per_second
            for other in rows
        )
    how = (
        f"{len(truth)} test images; speed: {rounds} rounds over one batch of {times[0][0]} images, "
        f"models in turn, "
        f"{get_device()}, {torch.get_num_threads()} threads, float32, torch {torch.__version__}"
    )
    chosen = _middles(points)
    return Comparison(
        rows=rows,
        how=how,
        images=np.stack([item.permute(1, 2, 0).cpu().numpy() for item in timed["inputs"][:SHOWN]]),
        truth=truth[:SHOWN],
        classes=list(getattr(loader.dataset, "metainfo", {}).get("classes", ())),
        looks=[
            Look(rows[index].name, looks[index], predictions[index][0][:SHOWN])  # type: ignore[arg-type]
            for index in chosen
        ],
    )


def _middles(points: Sequence[Entry]) -> list[int]:
    """Return one index per label: the middle one of its settings."""
    groups: dict[str, list[int]] = {}
    for index, point in enumerate(points):
        groups.setdefault(point.label, []).append(index)
    return [group[len(group) // 2] for group in groups.values()]


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


def _short(value: Any) -> str:
    """Return a setting as people write it: 0.6, 8, 22M."""
    if isinstance(value, float) and abs(value) >= 1e4:
        return f"{value / 1e6:g}M"
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text.

    Args:
        rows: Those of a `Comparison`.
    """
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}s}   top-1    MACs/image   of dense    seen   images/s   speed"]
    for row in rows:
        lines.append(
            f"{row.name:{width}s}  {row.top1:6.2f}  {row.macs / 1e6:9.1f} M  {row.mac_ratio:8.3f}  "
            f"{100 * row.seen:5.1f}%  {row.images_per_second:9.0f}  {row.speed:5.2f}x"
        )
    for row in rows:
        if row.same_predictions is not None:
            lines.append(
                f"'{row.name}' predicts as '{row.same_as}' on {row.same_predictions} of {row.images} images"
            )
    return "\n".join(lines)


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """Write the rows as CSV.

    Args:
        rows: Those of a `Comparison`.
        path: File; its folder is made.
    """
    tables.write_csv(path, [asdict(row) for row in rows])
