"""A hook that interrupts its own run at a place named in a file; imported by the runs of the soak test."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook

from patchreg.hooks import checkpoint
from patchreg.registry import HOOKS
from patchreg.runner import build

GUESS = 0.01
"""Seconds of an iteration before the first one was timed."""


@HOOKS.register_module()
class InterruptHook(Hook):
    """Send a signal to this run and its loader workers, once.

    The plan is a JSON file with `stage` (which of several runs), `at` (iterations done before the signal, at
    least), `signal`, `moment` and `delay` (in iterations); `then` is the moment of a SIGKILL after it. Moments:

    - `iteration`: any time in it, from a thread;
    - `validation`: before a batch of it;
    - `write`: half of a checkpoint is in its temporary file;
    - `rename`: the temporary file is complete;
    - `pointer`: the checkpoint has its name, `last_checkpoint` names the one before.

    What was done is written beside the plan, before the signal.

    Args:
        plan: The file; nothing happens without it.
        stage: Name of this run.
    """

    priority = "VERY_HIGH"

    def __init__(self, plan: str, stage: str) -> None:
        self.file = Path(plan)
        self.plan: dict[str, Any] = {}
        if self.file.is_file():
            self.plan = json.loads(self.file.read_text())
        if self.plan.get("stage") != stage:
            self.plan = {}
        self.moment = self.plan.get("moment")
        self.number = self.plan.get("signal", 0)
        self.done = 0
        self._marks: list[float] = []

    def before_train(self, runner: Any) -> None:
        """Put the signal into the three steps of writing a checkpoint."""
        if not self.plan:
            return
        put, rename, point = LocalBackend.put, build.replace_safely, checkpoint.write_safely

        def half(backend: LocalBackend, content: bytes, path: str) -> None:
            if self._due("write"):
                Path(path).write_bytes(content[: len(content) // 2])
                self._fire()
            put(backend, content, path)

        def renamed(partial: Path, path: Path) -> None:
            if self._due("rename"):
                self._fire()
            rename(partial, path)

        def pointed(path: Path, content: bytes) -> None:
            if self._due("pointer"):
                self._fire()
            point(path, content)

        LocalBackend.put = half
        build.replace_safely = renamed
        checkpoint.write_safely = pointed

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Start the clock of a signal that comes somewhere within this iteration."""
        self.done = runner.iter
        self._marks = [*self._marks[-1:], time.monotonic()]
        if self._due("iteration"):
            self.moment = None
            length = self._marks[-1] - self._marks[0] or GUESS
            timer = threading.Timer(self.plan["delay"] * length, self._fire)
            timer.daemon = True
            timer.start()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Count."""
        self.done = runner.iter + 1

    def before_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Interrupt a validation."""
        if self._due("validation"):
            self._fire()

    def _due(self, moment: str) -> bool:
        return self.moment == moment and self.done >= self.plan["at"]

    def _fire(self) -> None:
        number = self.number
        self.moment = self.plan.pop("then", None)
        self.number = signal.SIGKILL
        if self.moment is None:
            self.file.with_suffix(".done").write_text(str(self.done))
        os.killpg(os.getpgrp(), number)
