"""Starting the processes' common group, whatever launched them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from patchreg.utils.errors import ConfigError

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")


def _scontrol(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _address_of(node: str) -> str:
    """Return the name of a node if it means something to the network, else the address SLURM uses."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        found = re.search(r"\bNodeAddr=(\S+)", _scontrol("show", "node", node))
        return found.group(1) if found else node
    return node


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
        hosts = _scontrol("show", "hostnames", nodes).split()
        if not hosts:
            raise ConfigError(
                f"scontrol could not expand the node list '{nodes}'; set MASTER_ADDR to the first node"
            )
        os.environ["MASTER_ADDR"] = _address_of(hosts[0])
    # Jobs that share a node must not meet on one port.
    usual = 20000 + int(os.environ.get("SLURM_JOB_ID", 9500)) % 20000
    os.environ.setdefault("MASTER_PORT", port or str(usual))
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
    try:
        dist.init_process_group(
            backend=backend, timeout=timedelta(seconds=timeout), **_store_of_this_attempt(timeout)
        )
    except (dist.DistError, RuntimeError) as error:
        raise ConfigError(_why_not_joined(error, timeout)) from error


def _store_of_this_attempt(timeout: int) -> dict[str, Any]:
    """Keep what the processes tell each other after a restart apart from what those before them told.

    torchrun with a fixed address keeps its store through restarts, and torch 2.14 does not mark the
    attempts in it: processes would now and then wait at the addresses of the failed attempt.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if attempt == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    world = int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=False,
        timeout=timedelta(seconds=timeout),
    )
    marked = dist.PrefixStore(f"patchreg/attempt_{attempt}", store)
    return dict(store=marked, rank=int(os.environ["RANK"]), world_size=world)


def _why_not_joined(error: Exception, timeout: int) -> str:
    """Say in words why the processes of a run did not find each other."""
    rank, world = os.environ.get("RANK", "?"), os.environ.get("WORLD_SIZE", "?")
    place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    text = str(error)
    start = f"process {rank} of {world} could not join the others at {place}: "
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return f"{start}the port is in use; set another one in PORT (tools/dist_train.sh) or MASTER_PORT"
    if "timed out" in text.lower() or "timeout" in text.lower() or "connected" in text:
        return (
            f"{start}not all {world} processes came within {timeout} s (env_cfg.dist_cfg.timeout); "
            "look for the first error of the missing ones in their logs, and check that MASTER_ADDR "
            "and the port can be reached"
        )
    return f"{start}{text.splitlines()[0] if text else type(error).__name__}"
