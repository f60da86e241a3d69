"""Early exit against single networks, by measured time, in one picture."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import DictAction
from torch import Tensor

from patchreg.methods.anchornet.budget import solve_thresholds
from patchreg.methods.anchornet.ensemble import (
    TABLE,
    AnchorNetEnsembleClassifier,
    in_fixed_batches,
)
from patchreg.methods.anchornet.queue import EarlyExitQueue
from patchreg.methods.anchornet.table import ConfidenceTable
from patchreg.pictures import check_out
from patchreg.runner.api import load_model
from patchreg.runner.build import EngineRunner, config_errors, load_config, resolve_checkpoint
from patchreg.utils.draw import save_figure
from patchreg.utils.errors import ConfigError
from patchreg.utils.files import write_safely

HELP = {"earlyexit": "AnchorNet's early exit at several budgets against single networks, measured"}


def add_arguments(kind: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        kind: "earlyexit".
        parser: Where to add them.
    """
    parser.add_argument(
        "config", help="config of the ensemble, e.g. configs/anchornet/quick_dynamic.py"
    )
    parser.add_argument("checkpoint", help="ensemble.pth, with table.safetensors beside it")
    parser.add_argument(
        "--budgets", type=float, nargs="+", required=True, help="multiply-accumulates"
    )
    parser.add_argument(
        "--single",
        action="append",
        nargs="+",
        default=[],
        metavar="LABEL CONFIG CHECKPOINT [KEY=VALUE ...]",
        help="a network to compare with; repeat for each",
    )
    parser.add_argument("--images", type=int, default=2000, help="test images (default 2000)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--out", default="earlyexit.png", help="picture to write; .json beside it")


def run(kind: str, arguments: argparse.Namespace) -> str:
    """Measure, draw and say where the picture is.

    Args:
        kind: "earlyexit".
        arguments: Parsed options.
    """
    check_out(arguments.out)
    if arguments.images < 2 or arguments.rounds < 1:
        raise ConfigError("--images must be at least 2 and --rounds at least 1")
    singles = []
    for words in arguments.single:
        if len(words) < 3:
            raise ConfigError(
                f"--single {' '.join(words)}: expected LABEL CONFIG CHECKPOINT [KEY=VALUE ...]"
            )
        pairs = (word.partition("=") for word in words[3:])
        options = {key: DictAction._parse_iterable(value) for key, _, value in pairs}
        singles.append((words[0], words[1], words[2], options))
    rows = measure(
        arguments.config,
        arguments.checkpoint,
        arguments.budgets,
        singles,
        arguments.images,
        arguments.rounds,
    )
    path = Path(arguments.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safely(path.with_suffix(".json"), (json.dumps(rows, indent=1) + "\n").encode())
    draw(rows, path)
    lines = [f"{'':24s}   top-1   MMACs  ms/image"]
    lines += [
        f"{row['label']:24s}  {row['top1']:6.2f}  {row['macs'] / 1e6:6.1f}  {row['ms']:8.3f}"
        for row in rows
    ]
    return "\n".join([*lines, f"written to {path} and {path.with_suffix('.json')}"])


@torch.inference_mode()
def measure(
    path: str,
    checkpoint: str,
    budgets: Sequence[float],
    singles: Sequence[tuple[str, str, str, dict[str, Any]]],
    images: int = 2000,
    rounds: int = 3,
) -> list[dict[str, Any]]:
    """Classify the same images with early exit at each budget and with each single network, in turn.

    Thresholds are fitted on the images of the table that are not among those classified. Time is that of
    the process on a CPU, wall-clock time on a GPU; the median over rounds counts.

    Args:
        path: Config of the ensemble.
        checkpoint: Its checkpoint, with the table of the whole test set beside it.
        budgets: Mean multiply-accumulates per image.
        singles: Label, config, checkpoint and overrides of each single network.
        images: Test images, drawn evenly.
        rounds: Timed rounds, after one that is not counted.

    Raises:
        ConfigError: The models cannot be compared.
    """
    checkpoint = resolve_checkpoint(checkpoint)
    config = load_config(path, {"load_from": checkpoint})
    model = load_model(config, checkpoint)
    if not isinstance(model, AnchorNetEnsembleClassifier):
        raise ConfigError(f"'{path}' builds a {type(model).__name__}, not an ensemble")
    table = ConfidenceTable.load(Path(checkpoint).parent / TABLE)
    with config_errors("the test data cannot be read"):
        dataset: Any = EngineRunner.build_dataloader(config.test_dataloader, seed=0).dataset
    if len(dataset) != len(table):
        raise ConfigError(f"the table has {len(table)} images, the test set {len(dataset)}")
    step = max(1, len(dataset) // images)
    chosen = list(range(0, len(dataset), step))[:images]
    samples = [dataset[place] for place in chosen]
    labels = torch.tensor([int(sample["data_samples"].gt_label) for sample in samples])
    raw = torch.stack([sample["inputs"] for sample in samples])
    others = torch.ones(len(table), dtype=torch.bool)
    others[chosen] = False
    fit = table.rows(others) if bool(others.any()) else table
    found: list[dict[str, Any]] = []
    calls: list[Any] = []
    inputs = model.data_preprocessor(dict(inputs=raw), False)["inputs"]
    costs = torch.tensor(table.costs, dtype=torch.float64)
    for budget in budgets:
        queue = EarlyExitQueue(model, solve_thresholds(fit, budget))
        found.append(dict(label=f"early exit {budget / 1e6:.0f}M", kind="early exit", ms=[]))
        calls.append(_by_queue(queue, inputs, costs))
    for label, single_path, single_checkpoint, options in singles:
        single = load_model(load_config(single_path, options), single_checkpoint)
        ready = single.data_preprocessor(dict(inputs=raw), False)["inputs"]
        found.append(dict(label=label, kind="single network", ms=[]))
        calls.append(_by_network(single, ready, model.batch_size))
    for number in range(rounds + 1):
        for row, call in zip(found, calls):
            start = _clock(inputs)
            predicted, macs = call()
            seconds = _clock(inputs) - start
            if number:
                row["ms"].append(1000 * seconds / len(labels))
            row["top1"] = 100 * (predicted.cpu() == labels).double().mean().item()
            row["macs"] = macs
    for row in found:
        row["ms"] = statistics.median(row["ms"])
    return found


def _clock(inputs: Tensor) -> float:
    if inputs.is_cuda:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _by_queue(queue: EarlyExitQueue, inputs: Tensor, costs: Tensor) -> Any:
    def call() -> tuple[Tensor, float]:
        exits = sorted(queue.run([inputs]), key=lambda one: one.index)
        stages = torch.tensor([one.stage for one in exits])
        return torch.tensor([one.label for one in exits]), costs[stages].mean().item()

    return call


def _by_network(model: Any, inputs: Tensor, size: int) -> Any:
    sample = _Sample()
    macs = model.predict(inputs[:1], [sample])[0].macs

    def call() -> tuple[Tensor, float]:
        parts = in_fixed_batches(model, inputs, size)
        return torch.cat([out[:count].argmax(1) for out, count in parts]), macs

    return call


class _Sample:
    """Takes what a model predicts, in place of a data sample."""

    def set_pred_score(self, value: Tensor) -> None:
        pass

    def set_pred_label(self, value: Tensor) -> None:
        pass

    def set_field(self, value: Any, name: str, **_: Any) -> None:
        setattr(self, name, value)

    macs = 0.0


def draw(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draw accuracy over measured time.

    Args:
        rows: What `measure` returned.
        path: Picture to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.6, 3.9), layout="constrained")
    for kind, style in (("early exit", "s-"), ("single network", "o--")):
        points = sorted(
            (row["ms"], row["top1"], row["label"]) for row in rows if row["kind"] == kind
        )
        if not points:
            continue
        axis.plot([x for x, _, _ in points], [y for _, y, _ in points], style, label=kind)
        for x, y, label in points:
            axis.annotate(
                label.removeprefix("early exit "),
                (x, y),
                textcoords="offset points",
                xytext=(4, -10),
                fontsize=7,
            )
    axis.set_xlabel("measured ms per image")
    axis.set_ylabel("top-1 (%)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save_figure(figure, path)
