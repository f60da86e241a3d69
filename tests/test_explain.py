"""What tools/explain.py tells: files, parts, shapes and costs of every config that is shipped."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from patchreg.runner.anatomy import contributions, difference, explain, flat
from patchreg.runner.run import train

ROOT = Path(__file__).resolve().parent.parent
LEAVES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "configs").glob("*/*.py")
    if not path.name.startswith("_") and path.parent.name != "_base_"
)


@pytest.fixture(autouse=True)
def _in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


LARGE = pytest.mark.slow
"""Building every network of the papers takes minutes; the small ones stand for them in every test run."""


@pytest.mark.parametrize(
    "leaf", [leaf if "quick" in leaf else pytest.param(leaf, marks=LARGE) for leaf in LEAVES]
)
def test_every_config_is_explained(leaf: str) -> None:
    begun = time.process_time()
    text = explain(leaf)
    assert time.process_time() - begun <= 10.0
    assert f"  {leaf} " in text
    assert "(not run" not in text
    assert len(re.findall(r"^MODEL at 3 x \d+ x \d+", text, flags=re.MULTILINE)) >= 1


def cells(text: str, part: str) -> list[str]:
    (row,) = re.findall(rf"^ +{part} +(\S.*)$", text, flags=re.MULTILINE)
    return re.split(r" {2,}", row)


def test_shapes_parameters_and_costs_are_right() -> None:
    text = explain("configs/dge/dense_quick.py")
    assert cells(text, "patch_embed")[1:] == ["1 x 64 x 128", "6,272", "0.39"]
    tokens, dims, hidden = 65, 128, 256
    block = tokens * (4 * dims * dims + 2 * dims * hidden) + 2 * tokens * tokens * dims
    assert cells(text, "0") == ["TransformerBlock", "1 x 65 x 128", "132,480", f"{block / 1e6:.2f}"]
    whole = 4 * block + 64 * 48 * 128 + 128 * 10
    assert cells(text, "model")[1] == "1 x 10"
    assert cells(text, "model")[-1] == f"{whole / 1e6:.2f}"


def test_the_model_that_counts_its_own_cost_is_counted_once() -> None:
    text = explain("configs/patchdrop/quick_classifier.py")
    assert cells(text, "conv1")[-1] == f"{16 * 32 * 32 * 27 / 1e6:.2f}"


def test_each_value_belongs_to_the_file_that_sets_it() -> None:
    found = {file: (count, keys) for file, count, keys in contributions("configs/dge/quick.py")}
    assert list(found)[0] == "configs/_base_/runtime.py"
    assert list(found)[-1] == "configs/dge/quick.py"
    assert "train_dataloader" in found["configs/_base_/datasets/cifar10_quick.py"][1]
    assert "optim_wrapper" in found["configs/_base_/schedules/adamw_quick.py"][1]
    assert "optim_wrapper" not in found["configs/dge/quick.py"][1]
    from mmengine.config import Config

    values = flat(Config.fromfile("configs/dge/quick.py").to_dict())
    assert sum(count for count, _ in found.values()) == len(values)


def test_the_difference_of_two_configs() -> None:
    lines = difference("configs/dge/quick.py", "configs/dge/dense_quick.py").splitlines()
    assert "- model.type = 'DGEClassifier'" in lines
    assert "+ model.type = 'PatchClassifier'" in lines
    assert not any("optim_wrapper" in line for line in lines)
    same = difference("configs/dge/quick.py", "configs/dge/quick.py").splitlines()
    assert same[2:] == ["  no difference"]


def test_dry_run_shows_clipping_as_a_value(capsys: pytest.CaptureFixture) -> None:
    train("configs/pwself/vit_small.py", dry_run=True)
    assert "'per_tensor'" in capsys.readouterr().out
