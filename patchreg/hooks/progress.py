"""A live line on the terminal; the log file gets plain lines from the logger."""

from __future__ import annotations

import sys
import time
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from patchreg.registry import HOOKS


@HOOKS.register_module()
class ProgressHook(Hook):
    """Show rate and time left on a terminal; silent when the output goes to a file or a pipe.

    Args:
        interval: Seconds between updates.
    """

    # Before LoggerHook, whose lines then replace the live one.
    priority = "NORMAL"

    def __init__(self, interval: float = 0.5) -> None:
        self.interval = interval
        self._shown = 0.0
        self._count = 0
        self._since = 0.0

    def _start(self) -> None:
        self._since = self._shown = time.perf_counter()
        self._count = 0

    def before_train(self, runner: Any) -> None:
        """Start the clock."""
        self._start()

    def before_val_epoch(self, runner: Any) -> None:
        """Start the clock."""
        self._start()

    def before_test_epoch(self, runner: Any) -> None:
        """Start the clock."""
        self._start()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Update the line."""
        self._show("train", runner.iter + 1, runner.max_iters)

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Update the line."""
        self._show("val", batch_idx + 1, len(runner.val_dataloader))

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Update the line."""
        self._show("test", batch_idx + 1, len(runner.test_dataloader))

    def _show(self, stage: str, done: int, total: int) -> None:
        self._count += 1
        now = time.perf_counter()
        if now - self._shown < self.interval or not sys.stderr.isatty() or not is_main_process():
            return
        self._shown = now
        rate = self._count / (now - self._since)
        left = int((total - done) / rate)
        filled = 20 * done // max(total, 1)
        text = (
            f"{stage} [{'#' * filled}{'.' * (20 - filled)}] {done}/{total}  {rate:.1f} it/s  "
            f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        )
        # The carriage return at the end lets the next log line start in the first column.
        print(f"\r\x1b[K{text}\r", end="", file=sys.stderr, flush=True)
