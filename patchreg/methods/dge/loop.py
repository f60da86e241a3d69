"""Test of one checkpoint at several budgets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.runner import TestLoop

from patchreg.methods.dge.budget import bare_model, calibrate_budget, calibration_batches
from patchreg.methods.dge.model import DGEClassifier
from patchreg.metrics.cost import CostMetric
from patchreg.registry import LOOPS
from patchreg.utils.draw import draw_curves
from patchreg.utils.errors import ConfigError
from patchreg.utils.tables import write_csv

ROUNDS = 9
COLUMNS = ("budget", "calibration_share", "share", "macs", "top1", "images_per_second", "shift")


@LOOPS.register_module()
class DGEBudgetSweepLoop(TestLoop):
    """Calibrate and test a model at several budgets: accuracy, cost and time of each.

    The table goes to the log and, with a picture of it, to `budgets.csv` and `budgets.png` in the
    work dir. `share` is the cost relative to the dense twin on the calibration images and on the
    test images; `images_per_second` is the median of rounds in which all budgets run the same
    batch in turn. The evaluator needs `CostMetric` and an accuracy.

    Args:
        runner: The runner.
        dataloader: Loader of the test set, or its config.
        evaluator: Evaluator, or its config.
        budgets: Wanted shares of the dense twin's cost, in (0, 1].
        calibration_images: How many images at most are calibrated on, as by `DGEBudgetHook`.

    Raises:
        ConfigError: No budgets, or a model or evaluator without what the table needs.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        evaluator: Any,
        budgets: Sequence[float] = (0.5, 0.6, 0.7, 0.85, 1.0),
        calibration_images: int = 512,
    ) -> None:
        super().__init__(runner, dataloader, evaluator)
        model = bare_model(runner)
        if not isinstance(model, DGEClassifier) or model.accounting != "corrected":
            raise ConfigError(
                "DGEBudgetSweepLoop tests a DGEClassifier with model.accounting='corrected', in "
                "which budgets are counted"
            )
        if not budgets:
            raise ConfigError("budgets=[]: expected at least one share, such as [0.5, 0.7, 1.0]")
        self.budgets = sorted(float(budget) for budget in budgets)
        self.calibration_images = calibration_images

    def run(self) -> dict[str, float]:
        """Test at all budgets.

        Returns:
            The metrics of every budget, named `<budget>/<metric>`.

        Raises:
            ConfigError: A budget cannot be reached, or a metric is missing.
        """
        runner, model = self.runner, bare_model(self.runner)
        batches = calibration_batches(runner, "test", self.calibration_images)
        found = [calibrate_budget(model, batches, budget) for budget in self.budgets]
        runner.call_hook("before_test")
        runner.call_hook("before_test_epoch")
        runner.model.eval()
        costs = [item for item in self.evaluator.metrics if isinstance(item, CostMetric)]
        metrics: dict[str, float] = {}
        rows = []
        for budget, shifted in zip(self.budgets, found, strict=True):
            model.shift_routers(shifted["shift"])
            for index, batch in enumerate(self.dataloader):
                self.run_iter(index, batch)
            result = self.evaluator.evaluate(len(self.dataloader.dataset))
            metrics.update({f"{budget:g}/{name}": value for name, value in result.items()})
            missing = {"accuracy/top1", "cost/ratio", "cost/macs"} - set(result)
            if missing or not costs:
                raise ConfigError(
                    f"test_evaluator reports no {sorted(missing)}; add mmpretrain.Accuracy with "
                    "topk=(1, 5) and CostMetric"
                )
            rows.append(
                dict(
                    budget=budget,
                    calibration_share=shifted["share"],
                    share=result["cost/ratio"],
                    macs=result["cost/macs"] * costs[0].unit,
                    top1=result["accuracy/top1"],
                    shift=shifted["shift"],
                )
            )
        for row, rate in zip(rows, self._rates(found, batches[0]), strict=True):
            row["images_per_second"] = rate
        model.shift_routers(None)
        if is_main_process():
            self._report(rows)
        runner.call_hook("after_test_epoch", metrics=metrics)
        runner.call_hook("after_test")
        return metrics

    @torch.no_grad()
    def _rates(self, found: list[dict[str, float]], images: torch.Tensor) -> list[float]:
        """Return the images per second of each calibration, timed in turn after two warm-ups."""
        model = bare_model(self.runner)
        seconds: list[list[float]] = [[] for _ in found]
        for _ in range(ROUNDS + 2):
            for shifted, times in zip(found, seconds, strict=True):
                model.shift_routers(shifted["shift"])
                start = time.perf_counter()
                # Values on the host end the work of any device.
                model(images).sum().item()
                times.append(time.perf_counter() - start)
        return [len(images) / statistics.median(times[2:]) for times in seconds]

    def _report(self, rows: list[dict[str, float]]) -> None:
        folder = Path(self.runner.work_dir)
        write_csv(folder / "budgets.csv", rows, COLUMNS)
        curves = {"top-1 (%)": "top1", "images/s": "images_per_second"}
        draw_curves(
            [row["share"] for row in rows],
            {label: [row[name] for row in rows] for label, name in curves.items()},
            "share of the dense twin's MACs",
            folder / "budgets.png",
        )
        lines = ["budget  calibrated  on test set  MMACs   top-1  images/s"]
        lines += [
            f"{row['budget']:6.3f}  {row['calibration_share']:10.4f}  {row['share']:11.4f}  "
            f"{row['macs'] / 1e6:5.1f}  {row['top1']:6.2f}  {row['images_per_second']:8.0f}"
            for row in rows
        ]
        lines.append(f"written to {folder / 'budgets.csv'} and budgets.png")
        self.runner.logger.info("\n".join(["one checkpoint at several budgets", *lines]))
