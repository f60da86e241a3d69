"""Writing files so that a crash leaves the old one or the new one, never half of either."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or the names in a folder, are on disk.

    Args:
        path: File or folder.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_safely(partial: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Give a finished file its name, in place of the file that had it.

    Args:
        partial: Finished file under a temporary name in the same folder.
        path: Its final name.
    """
    sync(partial)
    os.replace(partial, path)
    sync(Path(path).parent)


def write_safely(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a small file in one step.

    Args:
        path: File to write or replace.
        content: Its new content.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    replace_safely(partial, path)


def write_through(path: str | os.PathLike[str], write: Callable[[str], Any]) -> None:
    """Let a function write a file under a temporary name, which becomes its final one in the end.

    Args:
        path: File to write or replace.
        write: Gets the temporary name, in the same folder and with the same ending.

    Raises:
        Exception: Whatever `write` raises; the old file is as it was then.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        write(str(partial))
        replace_safely(partial, path)
    finally:
        partial.unlink(missing_ok=True)
