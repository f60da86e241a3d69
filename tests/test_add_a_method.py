"""The page docs/add_a_method.md, followed to the letter in a copy of the tree."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/add_a_method.md").read_text()
FILES = re.findall(r"^`(\S+)`\n\n```\w+\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
COMMANDS = PAGE.split("## 4. The commands\n\n```\n")[1].split("```")[0].splitlines()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is in the repository, without the reference numbers, with the files of the page."""
    folder = tmp_path_factory.mktemp("tree")
    left_out = shutil.ignore_patterns("__pycache__", "golden", "runs", "*.pth")
    for name in ("patchreg", "configs", "tools", "docs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    shutil.copytree(ROOT / "ops", folder / "patchreg_ops", ignore=left_out)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "tests/golden").mkdir()
    for name, text in FILES:
        path = folder / name
        assert not path.exists(), f"{name} is no new file"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def call(folder: Path, command: str) -> str:
    """Run a command of the page; return what it prints."""
    words = shlex.split(command)
    assert words[0] == "python"
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def metrics(shown: str, name: str) -> float:
    return float(re.findall(rf"{name}: ([0-9.]+)", shown)[-1])


def test_the_files_of_the_page_keep_the_style(tree: Path) -> None:
    names = [name for name, _ in FILES]
    assert len(names) == 9
    sources = [name for name in names if name.endswith(".py")]
    for options in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *options, *sources],
            cwd=tree,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_commands_of_the_page_give_a_method(tree: Path) -> None:
    shown = {command[len("python ") :]: call(tree, command) for command in COMMANDS}
    flow = shown["tools/train.py configs/vivid/quick.py --dry-run"]
    assert re.search(r"selector +VividSelector +patchreg/methods/vivid/selector\.py:\d+", flow)
    assert "VividKeepHook" in flow
    trained = shown["tools/test.py configs/vivid/quick.py work_dirs/vivid/quick"]
    assert metrics(trained, "accuracy/top1") >= 35.0
    run = tree / "work_dirs/vivid"
    predictions = json.loads((run / "predictions/predictions.json").read_text())
    assert len(predictions) == 4
    for one in predictions:
        assert len(one["boxes"]) == 16
        assert one["macs"] < 0.35 * one["dense_macs"]
    assert (run / "patches.png").stat().st_size > 10_000
    with open(run / "compare/comparison.csv") as file:
        few, all_ = csv.DictReader(file)
    assert float(few["macs"]) < 0.35 * float(all_["macs"])
    assert float(few["seen"]) == pytest.approx(0.25)
    assert float(all_["seen"]) == pytest.approx(1.0)
    ranks = next(run.rglob("patchrank.csv"), None)
    assert ranks is not None
    assert "vivid" in ranks.read_text()
    assert "VividSelector" in (tree / "docs/configs.md").read_text()
    assert "configs/vivid/quick.py" in (tree / "docs/zoo.md").read_text()
    assert " [100%]" in shown["-m pytest tests/methods/test_method_vivid.py"]
