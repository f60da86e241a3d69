"""MMEngine's logger hook without its cost in the iterations that are not logged."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import LoggerHook as _LoggerHook

from patchreg.registry import HOOKS


@HOOKS.register_module()
class LoggerHook(_LoggerHook):
    """Write losses, rates and times to terminal, log file and visual backends every few iterations.

    Differs from official:
        Returns at once in between, and does not repeat the name of the experiment.
    """

    def before_train(self, runner: Any) -> None:
        """Remember the length of an epoch, which is dear to ask for in every iteration."""
        self._batches = len(runner.train_dataloader)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Log at the interval and at the end of an epoch.

        Args:
            runner: The runner.
            batch_idx: Batch within the epoch.
            data_batch: What the loader gave.
            outputs: What the training step returned.
        """
        due = (batch_idx + 1) % self.interval == 0
        last = batch_idx + 1 == self._batches
        if not due and not (last and (not self.ignore_last or self._batches <= self.interval)):
            return
        tag, text = runner.log_processor.get_log_after_iter(runner, batch_idx, "train")
        runner.logger.info(text)
        runner.visualizer.add_scalars(tag, step=runner.iter + 1, file_path=self.json_log_path)
