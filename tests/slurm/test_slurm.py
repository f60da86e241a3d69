"""Training under a real SLURM: two nodes, pre-empted, requeued; needs the daemons and PATCHREG_SLURM=1."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cluster as slurm
import ddp_parts
import launches
import pytest
from test_resume import same

from patchreg.runner.build import latest_checkpoint
from patchreg.utils.weights import load_file

ROOT = Path(__file__).resolve().parents[2]


pytestmark = [
    pytest.mark.ddp,
    pytest.mark.skipif(
        os.environ.get("PATCHREG_SLURM") != "1" or bool(slurm.missing()),
        reason="needs PATCHREG_SLURM=1, munged, slurmctld and slurmd (apt-get install slurm-wlm munge)",
    ),
]

CONFIG = (
    ddp_parts.CONFIG
    + """
train_dataloader = dict(batch_size=8, dataset=dict(data_root="nowhere", subset=160))
custom_hooks = [dict(type="RecordLossHook")]
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(by_epoch=False, interval=50, max_keep_ckpts=2)
)
"""
)
"""20 steps of half the batch in each of two processes."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    # Unix sockets have short names, shorter than pytest's folders may be.
    folder = Path(tmp_path_factory.mktemp("s"))
    with slurm.cluster(folder) as found:
        found.environment |= {
            "PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), os.environ.get("PYTHONPATH", ""))),
            "PATH": f"{Path(sys.executable).parent}:{found.environment['PATH']}",
            "OMP_NUM_THREADS": "1",
            "PATCHREG_ROOT": str(ROOT),
        }
        yield found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "quick.py"
    path.write_text(CONFIG.format(root=ROOT))
    return path


@pytest.fixture(scope="module")
def gloo(cluster: slurm.Cluster, config: Path) -> Path:
    """The run of two processes that torchrun starts on one host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    work_dir = config.parent / "gloo"
    done = subprocess.run(
        [str(ROOT / "tools/dist_train.sh"), str(config), "2", "--work-dir", str(work_dir)],
        env={**cluster.environment, "PORT": str(port)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return work_dir


def same_weights(found: Path, expected: Path) -> None:
    ours, theirs = (load_file(latest_checkpoint(folder)) for folder in (found, expected))
    for key in ("state_dict", "optimizer", "param_schedulers"):
        same(ours[key], theirs[key], key)
    assert launches.scalars(found) == launches.scalars(expected)


def submit(cluster: slurm.Cluster, config: Path, work_dir: Path) -> str:
    """Put a training that requeues itself into the queue and return the job's number."""
    said = cluster.call(
        "sbatch",
        "--partition=test",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        f"--output={work_dir}.out",
        str(ROOT / "tools/slurm/train.sbatch"),
        str(config),
        "--work-dir",
        str(work_dir),
        "--cfg-options",
        "custom_hooks.0.rest=0.5",  # slow enough to be interrupted
    )
    return said.split()[-1]


def wait_for_step(cluster: slurm.Cluster, job: str, work_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while launches.last_step(work_dir) < step:
        assert cluster.state(job) in ("PENDING", "RUNNING"), work_dir.with_suffix(
            ".out"
        ).read_text()
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.05)


def test_two_nodes_compute_what_two_processes_do(
    cluster: slurm.Cluster, config: Path, gloo: Path
) -> None:
    work_dir = config.parent / "two nodes"
    arguments = ["test", "quick", str(config), "--work-dir", str(work_dir)]
    done = subprocess.run(
        [str(ROOT / "tools/slurm_train.sh"), *arguments],
        env={
            **cluster.environment,
            "GPUS": "2",
            "GPUS_PER_NODE": "0",
            "CPUS_PER_TASK": "1",
            "SRUN_ARGS": "--nodes=2 --ntasks-per-node=1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:] + cluster.logs()
    same_weights(work_dir, gloo)


def test_first_losses_are_those_of_one_process(config: Path, gloo: Path) -> None:
    work_dir = config.parent / "one"
    options = {"train_dataloader.batch_size": 16}
    ddp_parts.run([dict(path=str(config), work_dir=str(work_dir), options=options)])
    expected, found = ddp_parts.losses(work_dir), ddp_parts.losses(gloo)
    assert len(expected) == len(found) == 20
    assert (found[:10] - expected[:10]).abs().max() < 1e-4


@pytest.mark.parametrize("how", ["requeue", "signal"])
def test_a_preempted_job_is_requeued_and_ends_with_the_same_weights(
    cluster: slurm.Cluster, config: Path, gloo: Path, how: str
) -> None:
    work_dir = config.parent / how
    job = submit(cluster, config, work_dir)
    wait_for_step(cluster, job, work_dir, 4)
    if how == "requeue":
        cluster.call("scontrol", "requeue", job)  # what a pre-emption does: SIGTERM, then the queue
    else:
        cluster.call("scancel", "--signal=USR1", job)  # the warning ahead of the time limit
    assert cluster.wait_for(job) == "COMPLETED", work_dir.with_suffix(".out").read_text()[-3000:]
    said = work_dir.with_suffix(".out").read_text()
    name = "SIGTERM" if how == "requeue" else "SIGUSR1"
    (iteration,) = re.findall(rf"stopped by {name} after iteration (\d+) ", said)
    assert 4 <= int(iteration) < 20
    assert "Restarts=1" in cluster.call("scontrol", "show", "job", job)
    same_weights(work_dir, gloo)


def test_a_mistake_in_the_config_fails_the_job_in_words(
    cluster: slurm.Cluster, config: Path
) -> None:
    wrong = config.parent / "wrong.py"
    wrong.write_text(config.read_text() + "\nmodel.update(headd=1)\n")
    work_dir = config.parent / "wrong"
    job = submit(cluster, wrong, work_dir)
    assert cluster.wait_for(job) == "FAILED"
    said = work_dir.with_suffix(".out").read_text()
    assert "headd" in said
    assert "Traceback" not in said
    assert not work_dir.exists()
    shutil.rmtree(work_dir, ignore_errors=True)
