"""Test of one checkpoint over the whole trade-off, beside policies that do not look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.runner import TestLoop
from torch import nn

from patchreg.methods.patchdrop.hook import patchdrop_model
from patchreg.methods.patchdrop.selector import PatchDropFixedSelector
from patchreg.registry import LOOPS
from patchreg.utils.draw import draw_lines
from patchreg.utils.errors import ConfigError
from patchreg.utils.tables import write_csv

COLUMNS = ("policy", "setting", "kept", "accuracy", "reward", "unique", "gmacs")


@LOOPS.register_module()
class PatchDropSweepLoop(TestLoop):
    """Test a policy at several thresholds and counts, and baselines at the same numbers of patches.

    The table goes to the log and, with a picture of it, to `patches.csv` and `patches.png` in the
    work dir. A baseline takes as many patches on average as the row of the policy it belongs to,
    with the same classifier. The evaluator needs `PatchDropPolicyMetric` and `CostMetric`.

    Args:
        runner: The runner.
        dataloader: Loader of the test set, or its config.
        evaluator: Evaluator, or its config.
        thresholds: Probabilities from which on a patch is kept.
        top_k: Numbers of patches, the most probable of each image.
        baselines: Patterns of `PatchDropFixedSelector`, tested at the patches of every row.

    Raises:
        ConfigError: There is nothing to test, or the model or evaluator is another one.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        evaluator: Any,
        thresholds: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        top_k: Sequence[int] = (),
        baselines: Sequence[str] = (),
    ) -> None:
        super().__init__(runner, dataloader, evaluator)
        model = patchdrop_model(runner)
        if not hasattr(model.selector, "top_k"):
            raise ConfigError(
                f"PatchDropSweepLoop moves the threshold of a policy; a {type(model.selector).__name__} "
                "has none (name its pattern in `baselines`)"
            )
        cells = model.selector.num_patches
        if any(not 0 <= count <= cells for count in top_k):
            raise ConfigError(
                f"top_k={list(top_k)}: expected 0 to {cells}, the patches of the grid"
            )
        if not thresholds and not top_k:
            raise ConfigError("PatchDropSweepLoop: set thresholds or top_k; both are empty")
        if any(not 0 < value < 1 for value in thresholds):
            raise ConfigError(f"thresholds={list(thresholds)}: expected values between 0 and 1")
        self.thresholds = thresholds
        self.top_k = top_k
        self.baselines = baselines

    def run(self) -> dict[str, float]:
        """Test all settings.

        Returns:
            The metrics of every setting, named `<policy>@<setting>/<metric>`.
        """
        runner, model = self.runner, patchdrop_model(self.runner)
        runner.call_hook("before_test")
        runner.call_hook("before_test_epoch")
        selector: Any = model.selector
        usual = selector.threshold, selector.top_k
        settings = [(value, None) for value in self.thresholds] + [(0.5, k) for k in self.top_k]
        rows = []
        try:
            for threshold, count in settings:
                selector.threshold, selector.top_k = threshold, count
                setting = f"p>={threshold:g}" if count is None else f"top {count}"
                row = self._test("policy", setting)
                rows.append(row)
                for pattern in self.baselines:
                    model.selector = self._baseline(pattern, row["kept"])
                    rows.append(self._test(pattern, setting))
                    model.selector = selector
        finally:
            model.selector = selector
            selector.threshold, selector.top_k = usual
        metrics = {
            f"{row['policy']}@{row['setting']}/{name}": row[name]
            for row in rows
            for name in ("kept", "accuracy")
        }
        if is_main_process():
            self._report(rows)
        runner.call_hook("after_test_epoch", metrics=metrics)
        runner.call_hook("after_test")
        return metrics

    def _baseline(self, pattern: str, kept: float) -> nn.Module:
        model = patchdrop_model(self.runner)
        return PatchDropFixedSelector(pattern, model.grid, kept)

    def _test(self, policy: str, setting: str) -> dict[str, Any]:
        self.runner.model.eval()
        for index, batch in enumerate(self.dataloader):
            self.run_iter(index, batch)
        found = self.evaluator.evaluate(len(self.dataloader.dataset))
        missing = {"policy/accuracy", "cost/macs"} - set(found)
        if missing:
            raise ConfigError(
                f"test_evaluator reports no {sorted(missing)}; add PatchDropPolicyMetric and "
                "CostMetric"
            )
        row = dict(
            policy=policy,
            setting=setting,
            kept=found["policy/kept_patches_mean"],
            accuracy=found["policy/accuracy"],
            reward=found["policy/reward"],
            unique=found["policy/unique_policies"],
            gmacs=found["cost/macs"],
        )
        self.runner.logger.info(
            f"{policy} {setting}: {row['accuracy']:.2f} % at {row['kept']:.2f} patches"
        )
        return row

    def _report(self, rows: list[dict[str, Any]]) -> None:
        folder = Path(self.runner.work_dir)
        write_csv(folder / "patches.csv", rows, COLUMNS)
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            curves.setdefault(row["policy"], []).append((row["kept"], row["accuracy"]))
        draw_lines(
            {name: sorted(points) for name, points in curves.items()},
            "patches kept",
            "top-1 (%)",
            folder / "patches.png",
        )
        lines = [
            "one checkpoint over the trade-off",
            "policy      setting   kept   top-1  reward  unique",
        ]
        lines += [
            f"{row['policy']:10s}  {row['setting']:8s} {row['kept']:5.2f}  {row['accuracy']:6.2f}  "
            f"{row['reward']:6.3f}  {row['unique']:6.0f}"
            for row in rows
        ]
        lines.append(f"written to {folder / 'patches.csv'} and patches.png")
        self.runner.logger.info("\n".join(lines))
