"""Evaluation of the Dynamic Grained Encoder at the budget of its model."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook

from patchreg.methods.dge.budget import bare_model, calibrate_budget, calibration_batches
from patchreg.registry import HOOKS


@HOOKS.register_module()
class DGEBudgetHook(Hook):
    """Calibrate the routers to `model.budget` before each evaluation; without one, do nothing.

    Images come from the training set, or from the evaluated one where there is no training set;
    labels are never used.

    Args:
        calibration_images: How many images at most.
    """

    # After the hook that puts the average of the weights in place.
    priority = "LOW"

    def __init__(self, calibration_images: int = 512) -> None:
        self.calibration_images = calibration_images

    def before_val_epoch(self, runner: Any) -> None:
        """Calibrate for a validation.

        Args:
            runner: The runner.
        """
        self._calibrate(runner, "val")

    def before_test_epoch(self, runner: Any) -> None:
        """Calibrate for a test.

        Args:
            runner: The runner.
        """
        self._calibrate(runner, "test")

    def prepare_model(self, runner: Any) -> None:
        """Calibrate for a comparison or a picture.

        Args:
            runner: Config, model and test set outside of a run.
        """
        self._calibrate(runner, "test")

    def _calibrate(self, runner: Any, stage: str) -> None:
        model = bare_model(runner)
        if getattr(model, "budget", None) is None:
            return
        batches = calibration_batches(runner, stage, self.calibration_images)
        found = calibrate_budget(model, batches, model.budget)
        runner.logger.info(
            f"budget {model.budget}: mean share {found['share']:.4f} with a shift of "
            f"{found['shift']:.4g} after {found['passes']:.0f} passes"
        )
