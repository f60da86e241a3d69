"""What a run says when its surroundings fail: a lost or missing process, a port in use, a full disk."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import ddp_parts
import launches
import pytest

from patchreg.runner import build
from patchreg.runner.run import train
from patchreg.utils.errors import ConfigError

pytestmark = pytest.mark.ddp


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "quick.py"
    path.write_text(ddp_parts.CONFIG.format(root=ddp_parts.ROOT))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(config: Path, ranks: list[int], port: int, *options: str) -> list[subprocess.Popen]:
    """Start some of two processes of a training; each writes what it says to `RANK.out`."""
    found = []
    for rank in ranks:
        environment = dict(
            OMP_NUM_THREADS="1",
            PYTHONPATH=str(Path(__file__).parent),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        command = [sys.executable, str(ddp_parts.ROOT / "tools/train.py"), str(config)]
        command += ["--work-dir", str(config.parent / "run"), "--launcher", "pytorch"]
        with open(config.parent / f"{rank}.out", "w") as output:
            found.append(
                subprocess.Popen(
                    [*command, "--cfg-options", "train_dataloader.batch_size=8", *options],
                    env={**os.environ, **environment},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    return found


def ends(processes: list[subprocess.Popen], seconds: float = 120) -> list[int]:
    """Wait for processes and return their exit codes; none stays behind."""
    try:
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def said(config: Path, rank: int) -> str:
    return (config.parent / f"{rank}.out").read_text()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run_group(command: list[str], **environment: str) -> tuple[int, str]:
    """Run a command that starts others; none of them stays behind."""
    shared = dict(
        OMP_NUM_THREADS="1",
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        PYTHONPATH=str(Path(__file__).parent),
    )
    run = subprocess.Popen(
        command,
        env={**os.environ, **shared, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text, _ = run.communicate(timeout=240)
        return run.returncode, text
    finally:
        # torchrun gives its processes sessions of their own and ends them when it is terminated.
        run.terminate()
        run.wait(30)


def test_a_lost_process_ends_the_others_in_words(config: Path) -> None:
    first, second = launch(config, [0, 1], free_port(), "custom_hooks.0.rest=0.2")
    wait_for(lambda: launches.last_step(config.parent / "run") >= 3)
    second.send_signal(signal.SIGKILL)
    assert ends([first, second]) == [2, -9]
    assert "error (process 0): the connection to another process of this run is lost" in said(
        config, 0
    )
    assert "Traceback" not in said(config, 0)


def test_the_process_that_failed_names_its_own_error_first(config: Path) -> None:
    options = (
        "custom_hooks.0.poison=1",
        "custom_hooks.0.at=3",
        "default_hooks.finite_loss.interval=1",
    )
    codes = ends(launch(config, [0, 1], free_port(), *options))
    assert codes == [2, 2]
    assert "error (process 1): the loss is not finite in iteration 4: loss nan" in said(config, 1)
    assert "Images of the batch: sample " in said(config, 1)
    assert "error (process 0): " in said(config, 0)
    for rank in (0, 1):
        assert "Traceback" not in said(config, rank)


def test_a_process_that_never_comes_is_named(config: Path) -> None:
    (only,) = launch(config, [0], free_port(), "env_cfg.dist_cfg.timeout=3")
    assert ends([only]) == [2]
    assert "process 0 of 2 could not join the others at 127.0.0.1:" in said(config, 0)
    assert "not all 2 processes came within 3 s" in said(config, 0)
    assert "Traceback" not in said(config, 0)
    assert not (config.parent / "run").exists()


def test_a_port_in_use_is_named(config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (only,) = launch(config, [0], port, "env_cfg.dist_cfg.timeout=5")
        assert ends([only]) == [2]
    assert f"at 127.0.0.1:{port}: the port is in use" in said(config, 0)
    assert "Traceback" not in said(config, 0)


def test_a_restart_by_torchrun_continues(config: Path) -> None:
    """One process is killed; torchrun starts both again, and they end with the weights of a whole run."""
    results = {}
    for name, options in {
        "whole": (),
        "restarted": ("custom_hooks.0.kill=1", "custom_hooks.0.at=7"),
    }.items():
        work_dir = config.parent / name
        code, text = run_group(
            [str(ddp_parts.ROOT / "tools/dist_train.sh"), str(config), "2"]
            + ["--work-dir", str(work_dir), "--cfg-options", "train_dataloader.batch_size=8"]
            + ["default_hooks.checkpoint.by_epoch=False", "default_hooks.checkpoint.interval=5"]
            + list(options),
            PORT=str(free_port()),
            MAX_RESTARTS="1",
        )
        assert code == 0, text[-3000:]
        results[name] = launches.scalars(work_dir)
        assert ("iteration 5 from" in text) == bool(options)
    assert len(results["whole"]) == 22
    assert results["restarted"] == results["whole"]


def test_a_full_disk_is_told_before_the_first_iteration(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=2**16)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"0\.1 MB left, and one checkpoint needs about 0\.\d MB"):
        train(str(config), work_dir=str(config.parent / "run"))
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize("folder", ["/proc/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_made_is_one_message(config: Path, folder: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ddp_parts.ROOT / "tools/train.py"), str(config), "--work-dir", folder],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert folder in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
