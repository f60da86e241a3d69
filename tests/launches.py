"""Runs of the tools in processes of their own: started, interrupted, read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

QUICK = """
_base_ = ["{root}/configs/dge/quick.py"]
model = dict(
    backbone=dict(arch=dict(embed_dims=32, depth=2, num_heads=2), drop_path_rate=0.2),
    head=dict(in_channels=32),
)
data_preprocessor = dict(batch_augment=dict(type="BatchMixup"))
train_dataloader = dict(
    batch_size=16, num_workers=2, dataset=dict(data_root="nowhere", subset=160)
)
val_dataloader = dict(batch_size=32, dataset=dict(data_root="nowhere", subset=50))
test_dataloader = val_dataloader
custom_hooks = [dict(type="ModelEMAHook", momentum=0.05)]
default_hooks = dict(
    logger=dict(interval=1),
    checkpoint=dict(by_epoch=False, interval=3, max_keep_ckpts=2),
)
"""
"""`configs/dge/quick.py` in 40 iterations: four epochs of ten, mixup, drop path, two workers."""


def quick_config(folder: Path) -> Path:
    """Write the shortened configuration and return its path."""
    path = folder / "quick.py"
    path.write_text(QUICK.format(root=ROOT))
    return path


def start(config: Path, work_dir: Path, *flags: str) -> subprocess.Popen:
    """Start a training in a process group of its own; its output goes to a file."""
    work_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(work_dir.with_suffix(".out"), "a") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tools/train.py"), str(config)]
            + ["--work-dir", str(work_dir), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def finish(run: subprocess.Popen, timeout: float = 240.0) -> int:
    """Wait for a run and return its exit code; nothing of it stays behind."""
    try:
        return run.wait(timeout)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()


def signal_after(
    run: subprocess.Popen, work_dir: Path, step: int, number: int, delay: float = 0.0
) -> int:
    """Send a signal to a run and its workers once it trains and a step is logged; return its exit code."""
    deadline = time.monotonic() + 240
    before = len(rows(work_dir))
    while len(rows(work_dir)) == before or last_step(work_dir) < step:
        assert run.poll() is None, work_dir.with_suffix(".out").read_text()[-3000:]
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.005)
    time.sleep(delay)
    os.killpg(run.pid, number)
    return finish(run)


def rows(work_dir: Path) -> list[dict]:
    """Return all logged rows of a run, over its log folders in the order they were made."""
    found = []
    for file in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in file.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # the line that a killed run did not finish
    return found


def scalars(work_dir: Path) -> dict[tuple[str, int], dict]:
    """Return the scalars of a run without its times.

    A resumed run logs again what the killed one had logged after its last checkpoint, so that the scalars of a
    run are the last row of every step; training and validation rows count their steps apart.
    """
    return {
        ("train" if "loss" in row else "val", row["step"]): {
            key: row[key] for key in row if "time" not in key
        }
        for row in rows(work_dir)
    }


def last_step(work_dir: Path) -> int:
    """Return the training step that was logged last."""
    return max((row["step"] for row in rows(work_dir) if "loss" in row), default=0)
