"""Reading the commands of the pages, and letting the tools parse them without running anything."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("configs/*/*.md"))
    if path.is_file()
)
_SHELL = {"dist_train.sh": ("train", 2), "dist_test.sh": ("test", 3)}
_SLURM = {"slurm_train.sh": "train", "slurm_test.sh": "test"}
_tools: dict[str, ModuleType] = {}


class Parsed(Exception):  # noqa: N818 - it is no error
    """The arguments are right."""


def commands_of(text: str) -> list[str]:
    """Return the commands with tools in a page: lines of code blocks, and code in the text."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    rest = re.sub(r"^ *```\w*\n.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    codes = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]
    # In the text a tool may be mentioned without all of its arguments.
    lines += [code for code in codes if re.search(r"configs/| --|prepare_data", code)]
    called = re.compile(
        r"([A-Z_]+=\S+ )*((torchrun|sbatch) .*|(bash |python )?tools/\S+\.(py|sh|sbatch)) .+"
    )
    found = []
    for line in lines:
        if called.fullmatch(line) and "..." not in line:
            found += expand(line)
    return found


def expand(line: str) -> list[str]:
    """Expand one {a,b} as a shell does, repeatedly."""
    braces = re.search(r"\{([^{}]*,[^{}]*)\}", line)
    if braces is None:
        return [line]
    parts = [line[: braces.start()] + part + line[braces.end() :] for part in braces[1].split(",")]
    return [one for part in parts for one in expand(part)]


def parse(command: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the tool of a command parse its arguments; return what it understood.

    Raises:
        AssertionError: The tool, a config or an argument does not exist.
    """
    # One capital letter, or a variable of the shell, stands for a number.
    words = [
        "1" if re.fullmatch(r"\$\w+|[A-Z]", word) else word
        for word in shlex.split(command, comments=True)
    ]
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    for word in words:
        if re.fullmatch(r"configs/\S+\.py", word):
            assert (ROOT / word).is_file(), f"{command}: {word} does not exist"
    place = next(number for number, word in enumerate(words) if word.startswith("tools/"))
    tool, arguments = words[place], words[place + 1 :]
    assert (ROOT / tool).is_file(), f"{command}: {tool} does not exist"
    name = Path(tool).stem
    if Path(tool).name in _SHELL:
        name, count = _SHELL[Path(tool).name]
        assert arguments[count - 1].isdigit() or arguments[count - 1].isupper(), command
        del arguments[count - 1]
    elif Path(tool).name in _SLURM:
        name, arguments = _SLURM[Path(tool).name], arguments[2:]
    elif tool.endswith(".sbatch"):
        name = "train"
    elif tool.endswith(".sh"):
        assert not [word for word in arguments if word.startswith("-")], command
        return None
    if name not in _tools:
        spec = importlib.util.spec_from_file_location(f"doc_{name}", ROOT / f"tools/{name}.py")
        _tools[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_tools[name])
    usual = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *given: Any, **named: Any) -> Any:
        raise Parsed(usual(self, *given, **named))

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [tool, *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        try:
            _tools[name].main()
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit as error:
            if error.code in (0, None):
                return None
            raise AssertionError(f"{command}: not understood") from error
    raise AssertionError(f"{command}: parsed nothing")
