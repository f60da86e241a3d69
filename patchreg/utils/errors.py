"""Errors that are meant for people, and the one place where tools turn them into messages."""

from __future__ import annotations

import atexit
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something the user gave is wrong; the text says what, what was expected and what to do.

    A tool prints it as one message and leaves with exit code 2. Of several processes the first one prints,
    because all have the same mistake, and any other one whose error is its `own`.
    """

    own = False


class ConfigError(UserError, ValueError):
    """A config, or a value that came from one, cannot be used."""


class InputTypeError(UserError, TypeError):
    """A value has the wrong type."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that was named does not exist."""


class DataError(UserError, ValueError):
    """A data set or one of its files cannot be used."""


class ProcessLostError(UserError):
    """Another process of a distributed run has gone."""


class CheckpointError(UserError, ValueError):
    """A checkpoint cannot be read, or does not belong to the model."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return the known names nearest to a misspelt one, best first.

    Args:
        name: The name that was not found.
        known: The names that exist.
        count: How many to return at most.
    """
    by_lower: dict[str, str] = {}
    for item in known:
        by_lower.setdefault(item.lower(), item)
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=count, cutoff=0.6)
    return [by_lower[item] for item in found]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'a' or 'b'?`, or an empty string when nothing is near."""
    names = nearest(name, known)
    if not names:
        return ""
    return " Did you mean " + " or ".join(repr(item) for item in names) + "?"


def message_of(error: BaseException) -> str:
    """Return the human part of an error that may have travelled out of a loader worker.

    A DataLoader worker re-raises an exception of the same class whose text is the whole formatted
    traceback; only what stands behind the last class name is meant for people.
    """
    text = str(error)
    if "Original Traceback" in text:
        marks = list(re.finditer(rf"^\S*{type(error).__name__}: ", text, flags=re.MULTILINE))
        if marks:
            text = text[marks[-1].end() :]
    return text.strip()


def leave(code: int) -> None:
    """End one process of several without the interpreter's tear-down.

    Threads of a process group that is torn down with the interpreter abort the process now and then, long after
    its work is done, and the launcher takes that for a failure. Exit functions are run and output is flushed.

    Args:
        code: Exit code.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_tool(main: Callable[[], int | None]) -> int:
    """Run a tool's main function and turn user errors into one message.

    A process of a distributed run ends here, see `leave`.

    Args:
        main: The function to run; its integer result is the exit code, None counts as 0.

    Returns:
        The exit code: 2 after a `UserError` (set `PATCHREG_TRACEBACK=1` to see where it was raised), 130
        after Ctrl-C.
    """
    stopped = None
    code = 0
    try:
        code = _run(main)
    except SystemExit as error:
        stopped = error
        code = error.code if isinstance(error.code, int) else 1
    except Exception:
        if _alone():
            raise
        traceback.print_exc()
        code = 1
    # Launchers other than torchrun tell the number of processes in words of their own; by now it is known.
    if not _alone():
        leave(code)
    if stopped is not None:
        raise stopped
    return code


def _alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) == 1


def _run(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except UserError as error:
        if os.environ.get("PATCHREG_TRACEBACK") == "1":
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank == 0 or error.own or os.environ.get("PATCHREG_ALL_RANKS") == "1":
            place = f" (process {rank})" if error.own and not _alone() else ""
            print(f"error{place}: {message_of(error)}", file=sys.stderr)
        # The frames of the failed run hold its loader workers, which end when they are let go.
        traceback.clear_frames(error.__traceback__)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has gone; what is left to print goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
