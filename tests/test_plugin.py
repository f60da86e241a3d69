"""A sixth method is added with new files only, and a broken neighbour does not stop it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toy

ROOT = Path(__file__).resolve().parent.parent


def run(arguments: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in a folder with one thread."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_out_of_tree_method_trains_by_custom_imports(tmp_path: Path) -> None:
    config = toy.write(tmp_path)
    done = run(
        [str(ROOT / "tools/train.py"), str(config.relative_to(tmp_path))], tmp_path, PYTHONPATH="."
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work_dirs/toy/quick/iter_12.pth").is_file()
    assert "top1" in done.stdout + done.stderr


@pytest.fixture
def copied_tree(tmp_path: Path) -> Path:
    """A copy of the package in which files can be added."""
    for name in ("patchreg", "ops"):
        shutil.copytree(
            ROOT / name,
            tmp_path / ("patchreg_ops" if name == "ops" else name),
            ignore=shutil.ignore_patterns("__pycache__", "data"),
        )
    return tmp_path


def test_sixth_method_in_the_tree_trains_beside_a_broken_one(copied_tree: Path) -> None:
    config = toy.write(copied_tree)
    text = config.read_text().replace('custom_imports = dict(imports=["toy_method"])\n', "")
    config.write_text(text)
    sixth = copied_tree / "patchreg/methods/toy"
    sixth.mkdir()
    (sixth / "__init__.py").write_text("from patchreg.methods.toy import model\n")
    shutil.move(str(copied_tree / "toy_method.py"), sixth / "model.py")
    broken = copied_tree / "patchreg/methods/broken"
    broken.mkdir()
    (broken / "__init__.py").write_text("import a_module_that_does_not_exist\n")
    done = run(
        [str(ROOT / "tools/train.py"), str(config)], copied_tree, PYTHONPATH=str(copied_tree)
    )
    assert done.returncode == 0, done.stderr
    code = (
        "from patchreg import registry\n"
        "try:\n    registry.MODELS.get('BrokenModel')\n"
        "except ValueError as error:\n    print(error)\n"
    )
    asked = run(["-c", code], copied_tree, PYTHONPATH=str(copied_tree))
    assert "patchreg.methods.broken" in asked.stdout
    assert "No module named 'a_module_that_does_not_exist'" in asked.stdout


def test_entry_point_method_is_found(tmp_path: Path) -> None:
    toy.write(tmp_path)
    info = tmp_path / "toy_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[patchreg.methods]\ntoy = toy_method\n")
    code = "from patchreg.registry import MODELS; print(MODELS.get('ToyClassifier').__module__)"
    done = run(["-c", code], tmp_path, PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == "toy_method", done.stderr


def test_discovery_adds_little_to_the_import_time() -> None:
    code = (
        "import time, mmengine.runner\n"
        "start = time.process_time()\n"
        "from patchreg import registry; registry.discover()\n"
        "print(time.process_time() - start, registry.FAILED)\n"
    )
    done = run(["-c", code], ROOT)
    assert done.stdout.strip().endswith("{}"), done.stdout + done.stderr
