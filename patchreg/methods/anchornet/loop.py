"""Evaluation of AnchorNet: making a confidence table, and early exit by it, simulated and real."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.model import is_model_wrapper
from mmengine.runner import TestLoop
from mmengine.runner.base_loop import BaseLoop
from torch import Tensor
from torch.utils.data import DataLoader

from patchreg.methods.anchornet.budget import (
    calibrate,
    calibration_error,
    fit_temperatures,
    solve_and_report,
)
from patchreg.methods.anchornet.ensemble import TABLE, AnchorNetEnsembleClassifier
from patchreg.methods.anchornet.metric import AnchorNetTableMetric
from patchreg.methods.anchornet.queue import EarlyExitQueue
from patchreg.methods.anchornet.table import ConfidenceTable
from patchreg.registry import LOOPS
from patchreg.runner.checkpoint import seal
from patchreg.utils.draw import save_figure
from patchreg.utils.errors import ConfigError
from patchreg.utils.files import replace_safely, write_safely
from patchreg.utils.tables import write_csv

WEIGHTS = "ensemble.pth"
OFFICIAL_TABLE = "table_official.pth"
UNITS = ("macs", "ms")


def ensemble_of(runner: Any) -> AnchorNetEnsembleClassifier:
    """Return the ensemble that a runner evaluates.

    Args:
        runner: The runner.

    Raises:
        ConfigError: Its model is another one.
    """
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if not isinstance(model, AnchorNetEnsembleClassifier):
        raise ConfigError(
            f"this test loop evaluates an AnchorNetEnsembleClassifier, not {type(model).__name__}; see "
            "configs/anchornet/resnet50_table.py"
        )
    return model


@LOOPS.register_module()
class AnchorNetTableLoop(TestLoop):
    """Run all stages on the test set and write the confidence table.

    The work dir gets `table.safetensors`, the same in the authors' format (`table_official.pth`) and
    the weights of all three networks in one file (`ensemble.pth`). The evaluator needs
    `AnchorNetTableMetric`.

    Source:
        `make_table.py` of the official repository.

    Args:
        runner: The runner.
        dataloader: Loader of the test set, or its config.
        evaluator: Evaluator, or its config.
        setup: What the table says about its networks.

    Raises:
        ConfigError: The model or the evaluator is another one.
    """

    def __init__(self, runner: Any, dataloader: Any, evaluator: Any, setup: str = "") -> None:
        super().__init__(runner, dataloader, evaluator)
        self.setup = setup
        self.model = ensemble_of(runner)
        if self.model.thresholds is not None:
            raise ConfigError("a table needs all stages of every image: set model.thresholds=None")
        found = [one for one in self.evaluator.metrics if isinstance(one, AnchorNetTableMetric)]
        if not found:
            raise ConfigError("test_evaluator holds no AnchorNetTableMetric, which makes the table")
        self.metric = found[0]

    def run(self) -> dict[str, float]:
        """Evaluate, then write the files.

        Returns:
            The metrics.
        """
        metrics = super().run()
        table = self.metric.table
        if is_main_process() and table is not None:
            folder = Path(self.runner.work_dir)
            table.setup = self.setup
            table.save(folder / TABLE)
            _save(table.to_official(), folder / OFFICIAL_TABLE)
            classes = getattr(self.dataloader.dataset, "metainfo", {}).get("classes", ())
            meta = {"dataset_meta": {"classes": tuple(classes)}}
            _save({"meta": meta, "state_dict": self.model.state_dict()}, folder / WEIGHTS)
            self.runner.logger.info(
                f"written to {folder}: {TABLE}, {OFFICIAL_TABLE}, {WEIGHTS} ({len(table)} images, "
                f"{table.stages} stages)"
            )
        return metrics

    def run_iter(self, idx: int, data_batch: Sequence[dict]) -> None:
        """Run one batch.

        Args:
            idx: Batch.
            data_batch: What the loader gave.
        """
        if self.metric.costs is None:
            inputs = self.model.data_preprocessor(data_batch, False)["inputs"]
            self.metric.costs = self.model.costs(tuple(inputs.shape[1:]))
        super().run_iter(idx, data_batch)


def _save(content: dict[str, Any], path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    torch.save(content, partial)
    seal(partial)
    replace_safely(partial, path)


@LOOPS.register_module()
class AnchorNetDynamicLoop(BaseLoop):
    """Early exit by a confidence table: thresholds swept, solved for budgets, and run for real.

    Thresholds for a budget are fitted on one half of the table and reported on the other. With
    `execute` the test set is then classified with each of them by `EarlyExitQueue`, and every
    decision is compared with the table's. The work dir gets `dynamic.json`, `dynamic.csv` and
    `dynamic.png`.

    Source:
        `dynamic_inference.py` of the official repository for the sweep; the rest is own.

    Args:
        runner: The runner.
        dataloader: Loader of the test set, or its config; read with `execute` only.
        evaluator: Not used.
        table: Confidence table, this project's or the authors'.
        thresholds: Rows of thresholds to evaluate; None takes the static points, each of which sends
            every image to one stage.
        budgets: Wanted mean costs of an image, in `unit`.
        unit: `macs`, or `ms`: milliseconds per image, measured here on batches of the model's size.
        costs: What stopping at each stage costs, for a table of the authors; None takes those of the
            table or of the model.
        image_size: Side in px for which the model's costs are counted.
        calibrated: Divide the logits of each stage by a temperature fitted on the same half.
        execute: Whether to run early exit on the test set.
        graphs: On a GPU, capture the networks.
        seed: Seed of the split.

    Raises:
        ConfigError: The model, the unit or a row of thresholds cannot be used.
        MissingFileError: The table does not exist.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        evaluator: Any = None,
        table: str = TABLE,
        thresholds: Sequence[Sequence[float]] | None = None,
        budgets: Sequence[float] = (),
        unit: str = "macs",
        costs: Sequence[float] | None = None,
        image_size: int = 224,
        calibrated: bool = False,
        execute: bool = False,
        graphs: bool = False,
        seed: int = 0,
    ) -> None:
        self._runner = runner
        if execute:
            super().__init__(runner, dataloader)
        else:
            # The table stands in for the images, which need not be here.
            self.dataloader: Any = DataLoader([])  # type: ignore[arg-type]
        if unit not in UNITS:
            raise ConfigError(f"unit={unit!r} is unknown; use one of {UNITS}")
        self.model = ensemble_of(runner)
        shape = (3, image_size, image_size)
        if costs is None and not table.endswith(".safetensors"):
            # The authors' tables do not tell costs, and may have more stages than the model.
            columns = ConfidenceTable.load(table, costs=()).stages
            costs = self.model.costs(shape, columns)
        self.table = ConfidenceTable.load(table, costs)
        if (execute or unit == "ms") and self.table.stages != self.model.stages:
            raise ConfigError(
                f"the table '{table}' has {self.table.stages} stages, the model {self.model.stages}; they must "
                "come from the same networks and selector"
            )
        self.unit, self.shape = unit, shape
        stages = self.table.stages
        self.rows = [
            tuple(float(value) for value in row)
            for row in (thresholds or [[1.0] * stage + [0.0] for stage in range(stages)])
        ]
        for row in self.rows:
            self.table.exits(row)
        self.budgets = sorted(float(budget) for budget in budgets)
        self.calibrated, self.execute = calibrated, execute
        self.graphs, self.seed = graphs, seed

    @torch.inference_mode()
    def run(self) -> dict[str, float]:
        """Evaluate all rows and budgets.

        Returns:
            Accuracy and cost of every row and budget.

        Raises:
            ConfigError: A budget cannot be met.
        """
        if self.execute:
            self.runner.call_hook("before_test")
            self.runner.call_hook("before_test_epoch")
        self.model.eval()
        table = self.table
        if self.unit == "ms":
            table.costs = measured_costs(self.model, self.shape)
            self.runner.logger.info(
                "ms per image that stops at each stage: "
                + ", ".join(f"{cost:.3f}" for cost in table.costs)
            )
        report: list[dict[str, Any]] = []
        for row in self.rows:
            report.append(dict(kind="thresholds", **asdict(table.evaluate(row))))
        notes: dict[str, Any] = {}
        solved = table
        if self.calibrated:
            fit, _ = table.halves(self.seed)
            temperatures = fit_temperatures(fit)
            solved = calibrate(table, temperatures)
            notes = dict(
                temperatures=temperatures,
                calibration_error_before=calibration_error(table),
                calibration_error_after=calibration_error(solved),
            )
            self.runner.logger.info(
                "calibration: " + ", ".join(f"{name} {_round(v)}" for name, v in notes.items())
            )
        for budget in self.budgets:
            solution = solve_and_report(solved, budget, self.seed)
            entry = dict(
                kind="budget",
                budget=budget,
                fitted_accuracy=solution.fitted.accuracy,
                fitted_cost=solution.fitted.cost,
                **asdict(solution.held_out),
            )
            if self.execute:
                entry |= self._execute(solved, solution.held_out.thresholds)
            report.append(entry)
        if is_main_process():
            self._write(report, notes)
        metrics = {
            f"{name}_{number}/{key}": entry[key]
            for number, entry in enumerate(report)
            for name in [entry["kind"]]
            for key in ("accuracy", "cost")
        }
        if self.execute:
            self.runner.call_hook("after_test_epoch", metrics=metrics)
            self.runner.call_hook("after_test")
        return metrics

    def _execute(self, table: ConfidenceTable, thresholds: Sequence[float]) -> dict[str, Any]:
        """Classify the test set for real; return time, accuracy, and where the table disagrees."""
        if self.calibrated:
            raise ConfigError(
                "execute=True runs on the confidences as they are; use it with calibrated=False"
            )
        queue = EarlyExitQueue(self.model, thresholds, graphs=self.graphs)
        batches: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in self.dataloader:
            data = self.model.data_preprocessor(batch, False)
            batches.append(data["inputs"])
            labels += [sample.gt_label.reshape(()).cpu() for sample in data["data_samples"]]
        truth = torch.stack(labels)
        if len(truth) != len(table):
            raise ConfigError(
                f"the test set has {len(truth)} images, the table {len(table)}; they must be the same"
            )
        # Reading images is not what is timed.
        start, cpu = time.perf_counter(), time.process_time()
        exits = sorted(queue.run(batches), key=lambda one: one.index)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        stage = torch.tensor([one.stage for one in exits])
        label = torch.tensor([one.label for one in exits])
        limit = table.exits(thresholds)
        wanted = torch.where(limit < 0, len(thresholds) - 1, limit)
        if table.views is not None:
            wanted = torch.minimum(wanted, table.views - 1)
        costs = torch.tensor(table.costs, dtype=torch.float64)
        return dict(
            executed_accuracy=(label == truth).double().mean().item(),
            executed_cost=costs[stage].mean().item(),
            seconds=seconds,
            cpu_seconds=cpu,
            images_per_second=len(exits) / seconds,
            decisions_unlike_table=int((stage != wanted).sum()),
        )

    def _write(self, report: list[dict[str, Any]], notes: dict[str, Any]) -> None:
        folder = Path(self.runner.work_dir)
        content = dict(
            table=os.path.basename(self.table.setup) or "table",
            images=len(self.table),
            unit=self.unit,
            costs=self.table.costs,
            **notes,
            rows=report,
        )
        write_safely(folder / "dynamic.json", json.dumps(content, indent=1).encode())
        write_csv(folder / "dynamic.csv", report)
        _draw(report, self.unit, folder / "dynamic.png")
        lines = [f"{'thresholds':44s}  accuracy      cost  left at each stage"]
        for entry in report:
            shown = " ".join(f"{value:.3f}" for value in entry["thresholds"])
            line = f"{shown:44s}  {entry['accuracy']:8.4f}  {_cost(entry['cost'], self.unit)}  {entry['exits']}"
            if entry["kind"] == "budget":
                line += f"  budget {_cost(entry['budget'], self.unit)}"
            if "seconds" in entry:
                line += (
                    f"; executed: {entry['executed_accuracy']:.4f} at "
                    f"{_cost(entry['executed_cost'], self.unit)}, {entry['images_per_second']:.1f} images/s, "
                    f"{entry['decisions_unlike_table']} decisions unlike the table's"
                )
            lines.append(line)
        lines.append(f"written to {folder}: dynamic.json, dynamic.csv, dynamic.png")
        self.runner.logger.info("\n".join(["early exit", *lines]))


def _draw(report: Sequence[dict[str, Any]], unit: str, path: Path) -> None:
    """Draw accuracy over cost: given thresholds, and budgets on the half they were not fitted on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    scale = 1e-6 if unit == "macs" else 1.0
    figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    names = {
        "thresholds": ("given thresholds, all images", "o--"),
        "budget": ("budgets, half not fitted on", "s-"),
    }
    for kind, (label, style) in names.items():
        points = sorted(
            (e["cost"] * scale, 100 * e["accuracy"]) for e in report if e["kind"] == kind
        )
        if points:
            axis.plot(*zip(*points), style, label=label)
    axis.set_xlabel("MMACs per image" if unit == "macs" else "ms per image")
    axis.set_ylabel("top-1 (%)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save_figure(figure, path)


def _round(values: Any) -> Any:
    return [round(value, 4) for value in values]


def _cost(value: float, unit: str) -> str:
    return f"{value / 1e6:8.2f}M" if unit == "macs" else f"{value:8.3f}ms"


@torch.inference_mode()
def measured_costs(
    model: AnchorNetEnsembleClassifier, shape: tuple[int, ...], rounds: int = 7
) -> tuple[float, ...]:
    """Measure what an image that stops at each stage costs here, in milliseconds.

    Each network runs on full batches of the model's size, in turn; the medians count.

    Args:
        model: The three networks, in evaluation mode.
        shape: Channels, height and width of the images.
        rounds: Timed rounds, after two that warm up.
    """
    device = next(model.parameters()).device
    images = torch.randn((model.batch_size, *shape), device=device)
    found = model.anchor.localise(images)
    rows = torch.arange(len(images), device=device)
    calls = (
        lambda: model.first_logits(images),
        lambda: model.anchor.localise(images),
        lambda: model.window_logits(images, rows, found.cells[:, 0], found),
    )
    seconds: list[list[float]] = [[], [], []]
    for number in range(rounds + 2):
        for times, call in zip(seconds, calls):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                times.append(time.perf_counter() - start)
    first, find, look = (1000.0 * sorted(times)[len(times) // 2] / len(images) for times in seconds)
    return tuple(first + (find + stage * look if stage else 0.0) for stage in range(model.stages))
