"""A SLURM cluster of two nodes on one host, in a folder of its own, for as long as a test needs it."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2")
CONF = """\
ClusterName=patchreg
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts when its old credential has expired; the usual 120 s are long for a test.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=60
SchedulerParameters=sched_interval=2,sched_min_interval=100000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Return the daemons that are not installed."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in DAEMONS if shutil.which(name, path=path) is None]


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Cluster:
    """Two nodes `n1` and `n2` in the partition `test`.

    Args:
        folder: Where configuration, state and logs lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin",
        }
        self._daemons: list[subprocess.Popen] = []

    def call(self, *command: str, timeout: float = 60.0) -> str:
        """Run a client of the cluster and return what it prints."""
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def logs(self) -> str:
        """Return the last lines of every daemon's log."""
        return "\n".join(
            f"-- {file.name}\n{file.read_text(errors='replace')[-2000:]}"
            for file in sorted(self.folder.glob("*.log"))
        )

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        conf = CONF.format(
            host=socket.gethostname(),
            user=getpass.getuser(),
            folder=self.folder,
            ports=free_ports(3),
        )
        (self.folder / "slurm.conf").write_text(conf)
        files = ("socket", "pid", "log", "seed")
        flags = [f"--{name}-file={self.folder}/munge.{name}" for name in files[1:]]
        self._start(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={self.folder}/munge.socket",
            *flags,
        )
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged made no socket")
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self._start("slurmd", "-D", "-c", "-N", node)
        self._wait(self._idle, "the nodes did not become idle")

    def _idle(self) -> bool:
        command = ["sinfo", "--noheader", "--format=%T %D"]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        )
        return done.stdout.split() == ["idle", "2"]

    def _start(self, name: str, *flags: str) -> None:
        with open(self.folder / f"{name}{len(self._daemons)}.log", "w") as output:
            self._daemons.append(
                subprocess.Popen(
                    [name, *flags],
                    env=self.environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _wait(self, ready, problem: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            for daemon in self._daemons:
                assert daemon.poll() is None, f"{daemon.args} ended\n{self.logs()}"
            assert time.monotonic() < deadline, f"{problem}\n{self.logs()}"
            time.sleep(0.1)

    def state(self, job: str) -> str:
        """Return the state of a job, such as PENDING, RUNNING, COMPLETED, FAILED."""
        shown = self.call("scontrol", "--oneliner", "show", "job", job)
        return next(word[9:] for word in shown.split() if word.startswith("JobState="))

    def wait_for(self, job: str, seconds: float = 300.0) -> str:
        """Wait until a job has ended for good and return its state."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
            assert time.monotonic() < deadline, f"job {job} is {state}\n{self.logs()}"
            time.sleep(0.2)
        return state

    def stop(self) -> None:
        """Cancel what runs and end the daemons, the last one first."""
        if len(self._daemons) > 1:
            subprocess.run(
                ["scancel", "--partition=test"],
                env=self.environment,
                capture_output=True,
                timeout=30,
                check=False,
            )
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._end_steps()

    def _end_steps(self) -> None:
        """End step daemons that outlived their node: they carry the cluster's folder in their files."""
        for item in Path("/proc").iterdir():
            if not item.name.isdecimal():
                continue
            try:
                environment = (item / "environ").read_bytes()
                command = (item / "cmdline").read_bytes()
            except OSError:
                continue
            if f"SLURM_CONF={self.folder}".encode() in environment and b"slurmstepd" in command:
                os.kill(int(item.name), signal.SIGKILL)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Run a cluster; it ends with the block, also when that fails."""
    found = Cluster(folder)
    try:
        found.start()
        yield found
    finally:
        found.stop()
