"""Starting the processes' common group, whatever launched them."""

from __future__ import annotations

import os
import subprocess
from datetime import timedelta

import torch
import torch.distributed as dist

from patchreg.utils.errors import ConfigError

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")


def _slurm_environment(port: str | None) -> None:
    """Translate SLURM's variables into the ones torch.distributed reads."""
    try:
        rank, world = os.environ["SLURM_PROCID"], os.environ["SLURM_NTASKS"]
        nodes = os.environ["SLURM_NODELIST"]
    except KeyError as error:
        raise ConfigError(
            f"--launcher slurm, but {error.args[0]} is not set; start the job with tools/slurm_train.sh or srun"
        ) from None
    if "MASTER_ADDR" not in os.environ:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False
        )
        hosts = shown.stdout.split()
        if not hosts:
            raise ConfigError(
                f"scontrol could not expand the node list '{nodes}'; set MASTER_ADDR to the first node"
            )
        os.environ["MASTER_ADDR"] = hosts[0]
    os.environ.setdefault("MASTER_PORT", port or "29500")
    os.environ["RANK"], os.environ["WORLD_SIZE"] = rank, world
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")


def _mpi_environment(port: str | None) -> None:
    """Translate Open MPI's variables into the ones torch.distributed reads."""
    try:
        os.environ["RANK"] = os.environ["OMPI_COMM_WORLD_RANK"]
        os.environ["WORLD_SIZE"] = os.environ["OMPI_COMM_WORLD_SIZE"]
        os.environ["LOCAL_RANK"] = os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]
    except KeyError as error:
        raise ConfigError(
            f"--launcher mpi, but {error.args[0]} is not set; start with mpirun"
        ) from None
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", port or "29500")


def init_processes(
    launcher: str, backend: str | None = None, timeout: int = 1800, port: str | None = None
) -> None:
    """Join the process group of a run; nothing happens for launcher `none`.

    Args:
        launcher: One of none, pytorch (torchrun), slurm, mpi.
        backend: `nccl` or `gloo`; by default nccl with a GPU per local process, else gloo.
        timeout: Seconds after which a collective that waits for a lost process fails.
        port: Port of the first process when the launcher does not tell one.

    Raises:
        ConfigError: The launcher is unknown or its environment is missing.
    """
    if launcher not in LAUNCHERS:
        raise ConfigError(f"launcher '{launcher}': expected one of {', '.join(LAUNCHERS)}")
    if launcher == "none" or dist.is_initialized():
        return
    if launcher == "slurm":
        _slurm_environment(port)
    elif launcher == "mpi":
        _mpi_environment(port)
    elif "RANK" not in os.environ:
        raise ConfigError(
            "--launcher pytorch, but RANK is not set; start with tools/dist_train.sh CONFIG N or torchrun"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    if backend is None:
        backend = "nccl" if gpus > 0 else "gloo"
    if backend == "nccl":
        if gpus == 0:
            raise ConfigError(
                "backend 'nccl' needs a GPU and none is visible; use 'gloo' or leave it out"
            )
        torch.cuda.set_device(local_rank % gpus)
    dist.init_process_group(backend=backend, timeout=timedelta(seconds=timeout))
