"""The generated pages, and what tools/zoo.py says when they and the configs differ."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.registry import init_default_scope

from patchreg.registry import MODELS
from patchreg.runner import zoo
from patchreg.runner.build import load_config
from patchreg.runner.rehearsal import (
    black_images,
    image_side,
    model_spec,
    side_of,
)
from patchreg.utils.errors import run_tool

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one method of two configs, and the pages written for it."""
    (tmp_path / "configs/dge").mkdir(parents=True)
    shutil.copytree(ROOT / "configs/_base_", tmp_path / "configs/_base_")
    for name in ("_base_.py", "quick.py", "dense_quick.py", "README.md"):
        shutil.copy(ROOT / "configs/dge" / name, tmp_path / "configs/dge")
    lines = ["Models:"]
    monkeypatch.chdir(tmp_path)
    for name in ("quick", "dense_quick"):
        count = zoo.parameters(f"configs/dge/{name}.py")
        lines += [
            f"  - Name: {name}",
            f"    Config: configs/dge/{name}.py",
            f"    Metadata: {{Parameters: {count}, Dense MACs: 39100000}}",
        ]
    lines += [
        "    Results:",
        "      - Dataset: CIFAR-10",
        "        Source: measured, 3 seeds",
        "        Metrics: {Top 1 Accuracy: 59.0}",
        "      - Dataset: ImageNet-1k",
        "        Source: authors' repository",
        "        Metrics: {Top 1 Accuracy: 99.0}",
    ]
    (tmp_path / "configs/dge/metafile.yml").write_text("\n".join(lines) + "\n")
    zoo.write()
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Call tools/zoo.py in this process; return its exit code."""
    spec = importlib.util.spec_from_file_location("zoo_tool", ROOT / "tools/zoo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["zoo.py", *arguments])
    return run_tool(module.main)


def test_parameters_are_those_of_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    dims, hidden, blocks = 128, 256, 4
    block = 4 * dims * dims + 4 * dims + 2 * dims * hidden + hidden + dims + 4 * dims
    vit = blocks * block + 48 * dims + dims + 65 * dims + dims + 2 * dims
    assert zoo.parameters("configs/dge/dense_quick.py") == vit + dims * 10 + 10
    assert zoo.parameters("configs/patchdrop/quick.py") is None


def test_figures_are_labelled(tree: Path) -> None:
    page = (tree / "docs/zoo.md").read_text()
    assert "Top 1 Accuracy 59.0 on CIFAR-10 (measured, 3 seeds)" in page
    assert (
        "Top 1 Accuracy 99.0 on ImageNet-1k (published, not reproduced: authors' repository)"
        in page
    )
    assert "| [dense_quick](../configs/dge/dense_quick.py) | 546 k | 39.1 M |  |" in page


def edit(path: str, old: str, new: str) -> Callable[[Path], None]:
    """A change of a file below a folder."""

    def change(folder: Path) -> None:
        text = (folder / path).read_text()
        assert old in text
        (folder / path).write_text(text.replace(old, new, 1))

    return change


DIFFERENCES = {
    "stale page": (
        edit("docs/zoo.md", "39.1 M", "39.2 M"),
        "'docs/zoo.md' is older than the configs and classes it lists; run python tools/zoo.py",
    ),
    "stale reference": (
        edit("docs/configs.md", "### LinearHead", "### LinaerHead"),
        "'docs/configs.md' is older",
    ),
    "missing page": (
        lambda folder: (folder / "docs/zoo.md").unlink(),
        "'docs/zoo.md' does not exist",
    ),
    "missing config": (
        lambda folder: (folder / "configs/dge/quick.py").unlink(),
        "configs/dge/metafile.yml: 'configs/dge/quick.py' does not exist",
    ),
    "missing weights": (
        edit("configs/dge/metafile.yml", "    Metadata:", "    Weights: no.pth\n    Metadata:"),
        "configs/dge/metafile.yml: 'no.pth' does not exist",
    ),
    "config in no metafile": (
        lambda folder: shutil.copy(folder / "configs/dge/quick.py", folder / "configs/dge/new.py"),
        "'configs/dge/new.py' is in no metafile; add it to configs/dge/metafile.yml",
    ),
    "other parameters": (
        edit("configs/dge/metafile.yml", "Parameters: ", "Parameters: 1"),
        "'configs/dge/quick.py' says Parameters: 1",
    ),
    "twice": (
        edit("configs/dge/metafile.yml", "configs/dge/quick.py", "configs/dge/dense_quick.py"),
        "names a config twice",
    ),
    "no metafile": (
        edit("configs/dge/metafile.yml", "Models:", "Modules:"),
        "is no list of Models",
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_is_one_message(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str
) -> None:
    change, expected = DIFFERENCES[name]
    change(tree)
    assert run(monkeypatch, "--check") == 2
    shown = capsys.readouterr()
    assert shown.err.count("error: ") == 1
    assert expected in shown.err
    assert shown.out == ""


def test_pages_that_were_just_written_pass(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch) == 0
    assert run(monkeypatch, "--check") == 0
    assert "2 configs agree with their metafiles" in capsys.readouterr().out


def test_the_reference_tells_type_default_and_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    page = zoo.reference()
    assert "### VisionTransformerBackbone" in page
    assert (
        "| `drop_path_rate` | `float` | `0.0` | Probability of dropping a branch in the last block, rising "
        "linearly from 0, in [0, 1). |" in page
    )
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    unexplained = [row for row in rows if row.endswith("|  |")]
    assert len(unexplained) < 0.1 * len(rows), unexplained
    # In flow order.
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert (
        headings.index("## Data sets") < headings.index("## Backbones") < headings.index("## Hooks")
    )


def test_arguments_of_a_docstring() -> None:
    text = """Do it.

    Args:
        first: One line,
            and another.
        second (int): Two: three.

    Raises:
        third: Not an argument.
    """
    assert zoo.arguments_of(text) == dict(first="One line, and another.", second="Two: three.")


def test_the_table_of_this_tree_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for path, text in zoo.pages().items():
        assert Path(path).read_text() == text, f"{path} is old; run python tools/zoo.py"
    assert set(zoo.leaves()) == set(zoo.metafiles())


@pytest.mark.slow
def test_the_metafiles_of_this_tree_agree_with_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    zoo.check_metafiles()


def test_told_costs_are_those_of_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifiers of moderate size, at the size of the images that reach them."""
    checked = 0
    monkeypatch.chdir(ROOT)
    for path, entry in zoo.metafiles().items():
        config = load_config(path, moved={"work_dirs": "work_dirs"})
        told = (entry.get("Metadata") or {}).get("Dense MACs")
        if told is None or "stages" in config:
            continue
        init_default_scope("patchreg")
        model = zoo._model(config)
        images = black_images(model, 1, side_of(model, image_side(config)))
        if not (hasattr(model, "extract") and hasattr(model, "cost")):
            continue
        if images[0, 0].numel() * sum(value.numel() for value in model.parameters()) > 1e11:
            continue
        model = MODELS.build(model_spec(config)).eval()
        with torch.inference_mode():
            assert model.cost(model.extract(images))[1] == told, path
        checked += 1
    assert checked >= 20
