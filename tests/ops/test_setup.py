"""The installation never fails on the operators unless asked to, and says what it built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(
        ROOT / "ops", tmp_path / "ops", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


def build(folder, **variables):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PATCHREG_BUILD_OPS", "CUDA_HOME")
    }
    environment |= {"CC": "/bin/false", "CXX": "/bin/false", **variables}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_no_compiler(checkout):
    result = build(checkout)
    assert result.returncode == 0, result.stderr
    assert (
        "patchreg_ops: NOT built, the pure PyTorch operators will run: the CPU build failed"
        in result.stdout
    )
    assert "pip install --no-build-isolation ." in result.stdout
    assert not list((checkout / "ops").glob("_C*"))


def test_no_compiler_but_required(checkout):
    result = build(checkout, PATCHREG_BUILD_OPS="1")
    assert result.returncode != 0
    assert "patchreg_ops: not built: the CPU build failed" in result.stderr


def test_switched_off(checkout):
    result = build(checkout, PATCHREG_BUILD_OPS="0")
    assert result.returncode == 0, result.stderr
    assert "patchreg_ops: not built: PATCHREG_BUILD_OPS=0" in result.stdout


def test_no_torch(checkout):
    (checkout / "torch.py").write_text("raise ImportError('no torch in this environment')\n")
    result = build(checkout, PYTHONPATH=str(checkout))
    assert result.returncode == 0, result.stderr
    assert "torch does not import here (no torch in this environment)" in result.stdout
    assert build(checkout, PYTHONPATH=str(checkout), PATCHREG_BUILD_OPS="1").returncode != 0


@pytest.mark.slow
def test_broken_cuda_compiler_leaves_the_cpu_kernels(checkout):
    nvcc = checkout / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    result = build(checkout, CUDA_HOME=str(nvcc.parents[1]), CC="cc", CXX="c++")
    assert result.returncode == 0, result.stderr
    assert "patchreg_ops: built CPU kernels" in result.stdout
    assert (checkout / "ops" / "_C.so").is_file()
