"""Stopping a training from outside: at the end of an iteration, with everything saved."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from patchreg.hooks.checkpoint import CheckpointHook

_PERIOD = 0.1
"""Seconds between two exchanges of wishes."""
_MOST = 1000
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE = 10.0
"""Seconds that a loader worker goes on after a SIGTERM, for the batch its parent may be waiting for."""


class TrainingStopped(SystemExit):
    """A signal stopped the training, and it can be continued.

    The exit code is 128 + the signal's number, as a shell reports it.

    Args:
        number: Number of the signal.
        checkpoint: What the run continues from; None when nothing could be saved.
    """

    def __init__(self, number: int, checkpoint: str | None) -> None:
        super().__init__(128 + number)
        self.number = number
        self.checkpoint = checkpoint


class LeaveValidation(BaseException):
    """Raised out of a validation that a resumed run repeats anyway."""


class StopSignals:
    """Notice SIGINT, SIGTERM and SIGUSR1 during a training; handlers are put back at the end.

    The first signal is a wish that `obey` grants; a second SIGINT interrupts at once. Processes of one run
    agree on the iteration; they exchange wishes about ten times a second and do not wait for each other.

    Args:
        parts: Iterations per optimisation step. Several processes stop between steps only, because their
            half accumulated gradients differ; one process saves them.
    """

    def __init__(self, parts: int = 1) -> None:
        self.number = 0
        self.leave_at_once = False
        self._parts = parts
        self._process = os.getpid()
        self._first = 0.0
        self._previous: dict[int, Any] = {}
        self._group: Any = None
        self._own_group = False
        self._exchange: Any = None
        self._sent = torch.zeros(2, dtype=torch.float64)
        self._last: float | None = None
        self._count = 0
        self._interval = 1
        self._agreed = 0

    def __enter__(self) -> StopSignals:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # A group of one's own only where the processes talk over something else than gloo.
            self._own_group = dist.get_backend() != "gloo"
            self._group = dist.new_group(backend="gloo") if self._own_group else dist.group.WORLD
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if kind is None and self._exchange is not None:
            self._exchange.wait()
        if kind is None and self._own_group:
            dist.destroy_process_group(self._group)
        # A group that is let go at the exit of the interpreter only can abort the process there.
        self._group = self._exchange = None

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked loader worker: its parent decides
        if number == signal.SIGINT and self.number == signal.SIGINT:
            # torchrun passes on the Ctrl-C that the terminal has already sent to every process.
            if self._group is None or time.monotonic() - self._first > 1.0:
                raise KeyboardInterrupt
            return
        if not self.number:
            self.number, self._first = number, time.monotonic()
        if self.leave_at_once:
            self.leave_at_once = False
            raise LeaveValidation

    def obey(self, runner: Any) -> None:
        """Stop before the next iteration if any process was told to; all stop at the same one.

        Args:
            runner: The runner of the training.

        Raises:
            TrainingStopped: The run is stopped, and saved.
        """
        if self._group is None:
            self._agreed = self.number
        elif not self._agreed:
            self._agree()
        if self._agreed and (self._group is None or runner.iter % self._parts == 0):
            self.stop(runner, self._agreed)

    def _agree(self) -> None:
        """Exchange wishes now and then: what was sent in one iteration is read in the next one."""
        if self._last is None:
            # No iteration has been timed yet; a duration of nothing would put the next exchange far away.
            self._last = time.monotonic()
            return
        self._count += 1
        if self._exchange is not None:
            self._exchange.wait()
            self._exchange = None
            number, duration = self._sent.tolist()
            self._agreed = int(number)
            # All processes have the same duration, that of the slowest, so they go on alike.
            self._interval = min(max(int(_PERIOD / max(duration, 1e-6)), 1), _MOST)
        if self._count >= self._interval and not self._agreed:
            now = time.monotonic()
            duration = (now - self._last) / self._count
            self._last, self._count = now, 0
            self._sent = torch.tensor([self.number, duration], dtype=torch.float64)
            self._exchange = dist.all_reduce(
                self._sent, dist.ReduceOp.MAX, group=self._group, async_op=True
            )

    def stop(self, runner: Any, number: int) -> None:
        """Save what the run continues from, say how, and leave.

        Args:
            runner: The runner of the training.
            number: Number of the signal.

        Raises:
            TrainingStopped: Always.
        """
        hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
        name = signal.Signals(number).name
        place = f"stopped by {name} after iteration {runner.iter} (epoch {runner.epoch + 1})"
        path = hooks[0].save_position(runner) if hooks else None
        if self._group is not None:
            # A process that ends early would make the launcher kill the one that is still writing.
            dist.barrier(group=self._group)
        if path is None:
            runner.logger.warning(
                f"{place}; nothing was saved, because the config has no CheckpointHook"
            )
        else:
            runner.logger.warning(
                f"{place}; checkpoint: {path}; continue with: {command_to_continue()}"
            )
        raise TrainingStopped(number, path)


def command_to_continue() -> str:
    """Return the command line of this process, or of its launcher, with `--resume`."""
    arguments = sys.argv[1:]
    if not sys.argv[0].endswith(".py"):
        return "the same call and resume='auto'"
    if "--resume" in arguments:
        place = arguments.index("--resume")
        following = arguments[place + 1 : place + 2]
        takes_value = bool(following) and following[0].endswith((".pth", "auto"))
        del arguments[place : place + 1 + takes_value]
    arguments = [item for item in arguments if not item.startswith("--resume=")]
    start = ["python", sys.argv[0]]
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.argv[0].endswith("train.py") and arguments:
        place = arguments.index("--launcher") if "--launcher" in arguments else -1
        if place >= 0:
            del arguments[place : place + 2]
        start = [sys.argv[0].replace("train.py", "dist_train.sh"), arguments.pop(0)]
        start.append(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return shlex.join([*start, *arguments, "--resume"])


class _FirstTermination:
    """Handler of loader workers: a SIGTERM is the parent's business first; the worker ends a little later."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._seen = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._seen or number == signal.SIGALRM or os.getppid() != self._parent:
            os._exit(0)
        self._seen = True
        # An interpreter that ends terminates its workers once and waits for them.
        signal.signal(signal.SIGALRM, self)
        signal.setitimer(signal.ITIMER_REAL, GRACE)


def start_worker(worker_id: int, then: Callable[[int], None] | None) -> None:
    """Keep a loader worker alive when a signal goes to the whole process group, as SLURM sends it.

    Args:
        worker_id: Number of the worker.
        then: What else a worker does at its start.
    """
    signal.signal(signal.SIGTERM, _FirstTermination())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if then is not None:
        then(worker_id)


def shielded(init: Callable[[int], None] | None) -> Callable[[int], None]:
    """Return a worker's start function that survives stop signals.

    Args:
        init: What else a worker does at its start.
    """
    return partial(start_worker, then=init)
