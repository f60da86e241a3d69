"""Parts and runs for the tests of several processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from torch import nn

from patchreg.registry import HOOKS, MODELS
from patchreg.runner import run as engine
from patchreg.runner import stop
from patchreg.runner.launch import init_processes
from patchreg.runner.run import process_group
from patchreg.runner.stop import TrainingStopped
from patchreg.utils.errors import leave

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
_base_ = ["{root}/configs/dge/quick.py"]
custom_imports = dict(imports=["ddp_parts"])
model = dict(
    backbone=dict(
        arch=dict(embed_dims=32, depth=2, num_heads=2), drop_path_rate=0.3, drop_path_mode="query"
    ),
    head=dict(in_channels=32),
    budget_loss=dict(scope="global", loss_weight=4.0),
)
data_preprocessor = dict(batch_augment=dict(type="BatchMixup", scope="global"))
optim_wrapper = dict(
    _delete_=True, type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05)
)
param_scheduler = dict(_delete_=True, type="ConstantLR", factor=1.0)
train_cfg = dict(max_epochs=2)
train_dataloader = dict(batch_size=16, dataset=dict(data_root="nowhere", subset=160))
val_dataloader = dict(batch_size=8, dataset=dict(data_root="nowhere", indices=51))
test_dataloader = val_dataloader
custom_hooks = [dict(type="RecordLossHook")]
default_hooks = dict(logger=dict(interval=1))
"""
"""20 steps of `configs/dge/quick.py` with everything that draws; 51 images do not divide by two."""


def in_float64(name: str) -> None:
    """Register a model in float64, preprocessor included, as `Double...`, once."""
    if f"Double{name}" in MODELS:
        return
    base: Any = MODELS.get(name)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        base.__init__(self, *args, **kwargs)
        self.double()

    # From its construction on, so that its data parallel wrapper agrees.
    __init__.__wrapped__ = base.__init__  # type: ignore[attr-defined]
    made = type(f"Double{name}", (base,), dict(__init__=__init__, __doc__=base.__doc__))
    MODELS.register_module(module=made)


for model in (
    "DGEClassifier",
    "PWSelfPretrainer",
    "PatchGamePretrainer",
    "PatchClassifier",
    "PatchDropClassifier",
    "PatchDropTokenClassifier",
    "AnchorNetClassifier",
    "AnchorNetResizedClassifier",
    "AnchorNetPatchClassifier",
):
    in_float64(model)


@HOOKS.register_module()
class FixedNormHook(Hook):
    """Let BatchNorm use its running statistics in training, as all processes have the same ones."""

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Switch the layers."""
        for layer in runner.model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()


@HOOKS.register_module()
class RecordLossHook(Hook):
    """Write this process's loss of every iteration to the work dir; harm one process if asked.

    Args:
        terminate: Rank that gets a SIGTERM, or None.
        kill: Rank that gets a SIGKILL at the first start of the run, or None.
        poison: Rank whose loss becomes NaN in the next iteration, or None.
        at: Iterations done at that time.
        rest: Seconds to wait after every iteration.
    """

    priority = "HIGH"

    def __init__(
        self,
        terminate: int | None = None,
        kill: int | None = None,
        poison: int | None = None,
        at: int = 0,
        rest: float = 0.0,
    ) -> None:
        self.terminate, self.kill, self.poison = terminate, kill, poison
        self.at, self.rest = at, rest
        self.losses: list[float] = []

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Keep the loss."""
        self.losses.append(outputs["loss"].item())
        time.sleep(self.rest)
        if self.at == runner.iter + 1:
            if self.terminate == get_rank():
                os.kill(os.getpid(), signal.SIGTERM)
            if self.kill == get_rank() and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
                os.kill(os.getpid(), signal.SIGKILL)
        if self.poison == get_rank() and self.at == runner.iter:
            outputs["loss"].fill_(float("nan"))

    def after_train(self, runner: Any) -> None:
        """Write the losses."""
        torch.save(self.losses, Path(runner.work_dir, f"losses_{get_rank()}.pt"))


def run(jobs: list[dict[str, Any]]) -> list[int]:
    """Run trainings one after the other and return their exit codes."""
    codes = []
    for job in jobs:
        try:
            engine.train(**job)
            codes.append(0)
        except TrainingStopped as stopped:
            codes.append(stopped.code)
    return codes


def run_two(
    folder: Path, jobs: list[dict[str, Any]], meanwhile: Callable[[], Any] | None = None
) -> list[int]:
    """Run trainings in two processes, and something else in this one; return the exit codes of the first.

    What each process says goes to `RANK.out` in the folder.
    """
    plan = folder / "plan.json"
    plan.write_text(json.dumps([{**job, "launcher": "pytorch"} for job in jobs]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = dict(
        OMP_NUM_THREADS="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    processes = []
    for rank in range(2):
        with open(folder / f"{rank}.out", "w") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", "import ddp_parts; ddp_parts.main()", str(plan)],
                    env={**os.environ, **shared, "RANK": str(rank)},
                    cwd=Path(__file__).parent,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        if meanwhile is not None:
            meanwhile()
        codes = [process.wait(300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, code in enumerate(codes):
        assert code == 0, (folder / f"{rank}.out").read_text()[-4000:]
    found = [json.loads(plan.with_suffix(f".codes{rank}").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    return found[0]


def losses(work_dir: Path) -> torch.Tensor:
    """Return the losses of a run, as means over its processes."""
    files = sorted(work_dir.glob("losses_*.pt"))
    return torch.tensor([torch.load(file) for file in files], dtype=torch.float64).mean(0)


def main() -> None:
    """Be one process of a launch: run the jobs of the file given, write their exit codes beside it."""
    # The whole run takes less than a second.
    stop._PERIOD = 0.01
    with process_group():
        init_processes("pytorch")
        found = run(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[1]).with_suffix(f".codes{os.environ['RANK']}").write_text(json.dumps(found))
    leave(0)
