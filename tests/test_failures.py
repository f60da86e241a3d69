"""What a run says when its surroundings fail: a lost process, a port in use, a full or read-only disk."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import ddp_parts
import launches
import pytest
from mmengine.visualization import LocalVisBackend

from patchreg.runner import build
from patchreg.runner.checkpoint import check_file
from patchreg.runner.run import train
from patchreg.utils.errors import ConfigError, UserError

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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB in memory, to be filled or remounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root to mount a tmpfs: run as root, in a container with CAP_SYS_ADMIN")
    made = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder))
    if made.returncode:
        pytest.skip(
            f"cannot mount a tmpfs ({made.stderr.strip()}): give the container CAP_SYS_ADMIN"
        )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def mount(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)


def alone(config: Path, work_dir: Path, *options: str) -> tuple[int, str]:
    """Train in one process; return its exit code and what it said."""
    done = subprocess.run(
        [sys.executable, str(ddp_parts.ROOT / "tools/train.py"), str(config)]
        + ["--work-dir", str(work_dir), *options],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


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


OFTEN = {
    "default_hooks.checkpoint.by_epoch": False,
    "default_hooks.checkpoint.interval": 1,
    "default_hooks.checkpoint.max_keep_ckpts": -1,
}


def test_a_disk_that_fills_up_costs_no_checkpoint(config: Path, disk: Path) -> None:
    """Each checkpoint has 0.3 MB, so that the seventh has no room; the run goes on when there is some."""
    work_dir = disk / "run"
    options = [f"{key}={value}" for key, value in OFTEN.items()]
    code, said = alone(config, work_dir, "--cfg-options", *options)
    assert code == 2, said
    assert "cannot be written (No space left on device); those before it are as they" in said
    assert "Traceback" not in said
    kept = sorted(work_dir.glob("*.pth"))
    assert 3 < len(kept) < 10
    assert not list(work_dir.glob(".*"))
    before = [path.read_bytes() for path in kept]
    for path in kept:
        check_file(path, required=True)
    # Still full: said before the first iteration, and nothing is harmed.
    (work_dir / "others").write_bytes(bytes(free(work_dir) - 2**16))
    with pytest.raises(ConfigError, match=r"0\.1 MB left, and one checkpoint needs about 0\.\d MB"):
        train(str(config), work_dir=str(work_dir), options=OFTEN, resume="auto")
    assert [path.read_bytes() for path in kept] == before
    assert mount("-o", "remount,size=64m", str(disk)).returncode == 0
    train(str(config), work_dir=str(work_dir), options=OFTEN, resume="auto")
    train(str(config), work_dir=str(config.parent / "whole"), options=OFTEN)
    found, expected = launches.scalars(work_dir), launches.scalars(config.parent / "whole")
    assert len(expected) == 22
    assert found == expected


def free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def test_logs_that_cannot_be_written_end_the_run_in_words(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalVisBackend, "add_scalars", full)
    with pytest.raises(
        UserError, match=r"cannot write its logs any more \(No space left on device"
    ):
        train(str(config), work_dir=str(config.parent / "run"))


def test_a_read_only_folder_is_told_before_the_first_iteration(config: Path, disk: Path) -> None:
    work_dir = disk / "run"
    # In a process of its own: a disk with open files stays writable.
    assert alone(config, work_dir, "--cfg-options", "train_cfg.max_epochs=1")[0] == 0
    before = {path: path.read_bytes() for path in work_dir.rglob("*") if path.is_file()}
    made = mount("-o", "remount,ro", str(disk))
    assert made.returncode == 0, made.stderr
    code, said = alone(config, work_dir, "--resume")
    assert code == 2, said
    assert said.splitlines()[-1].startswith(
        f"error: work dir '{work_dir}' cannot be written (Read-only file system)"
    )
    assert "Traceback" not in said
    with pytest.raises(ConfigError, match=r"new' cannot be made \(Read-only file system\)"):
        train(str(config), work_dir=str(disk / "new"))
    assert mount("-o", "remount,rw", str(disk)).returncode == 0
    assert {path: path.read_bytes() for path in work_dir.rglob("*") if path.is_file()} == before
    train(str(config), work_dir=str(work_dir), resume="auto")
    assert launches.last_step(work_dir) == 20


@pytest.mark.parametrize("folder", ["/proc/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_made_is_one_message(config: Path, folder: str) -> None:
    code, said = alone(config, Path(folder))
    assert code == 2, said
    assert folder in said.splitlines()[-1]
    assert "Traceback" not in said
