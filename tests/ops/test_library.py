"""Which implementation runs: modes, warnings and broken libraries, each in a fresh process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from patchreg_ops import _library

OPS = Path(_library.__file__).parent
USE = """
import warnings, torch, patchreg_ops as ops
info = ops.build_info()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        plan = ops.row_plan(torch.zeros(1, 1, 1, dtype=torch.int64), (2, 1), 2, 2, 0)
        rows = ops.compress(torch.arange(4.0).view(1, 4, 1), plan, 2, 2, 0)
        assert rows.flatten().tolist() == [0, 1, 2, 3]
print(info["mode"], info["cpu"], info["library"], info["error"], len(caught), sep="|")
print(*[str(item.message) for item in caught])
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package without compiled libraries, importable from the returned folder."""
    shutil.copytree(
        OPS, tmp_path / "patchreg_ops", ignore=shutil.ignore_patterns("*.so", "*.pyd", "csrc")
    )
    return tmp_path


def run(folder, mode=None):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PATCHREG_")}
    environment["PYTHONPATH"] = str(folder)
    if mode is not None:
        environment["PATCHREG_OPS"] = mode
    return subprocess.run(
        [sys.executable, "-c", USE],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_library(package):
    result = run(package)
    info, message = result.stdout.splitlines()
    assert info.startswith("auto|False|None|no compiled library in ")
    assert info.endswith("|1"), "one warning in all, not one per call"
    assert "slow reference path on cpu" in message
    assert "pip install --no-build-isolation ." in message


def test_reference_mode_is_silent(package):
    info, message = run(package, "reference").stdout.splitlines()
    assert info == "reference|False|None|switched off by PATCHREG_OPS=reference|0"
    assert message == ""


def test_require_mode_fails(package):
    result = run(package, "require")
    assert result.returncode != 0
    assert "ImportError: PATCHREG_OPS=require, but no compiled library in" in result.stderr


def test_unknown_mode_fails(package):
    result = run(package, "fast")
    assert (
        "PATCHREG_OPS='fast' is unknown; expected one of auto, reference, require" in result.stderr
    )


def test_broken_library_is_remembered(package):
    (package / "patchreg_ops" / "_C.so").write_bytes(b"not a library")
    result = run(package)
    info, message = result.stdout.splitlines()[0], result.stdout
    assert "_C.so does not load with torch" in info
    assert info.endswith("|1")
    assert "slow reference path" in message
    result = run(package, "require")
    assert "_C.so does not load with torch" in result.stderr
    assert result.returncode != 0


def test_build_info_of_this_process():
    import patchreg_ops as ops

    info = ops.build_info()
    assert list(info) == ["mode", "cpu", "cuda", "library", "error", "torch"]
    assert (info["library"] is None) == (info["error"] is not None)
    assert info["cpu"] == (info["library"] is not None)
