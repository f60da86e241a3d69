"""AnchorNet's stages as whole runs on the embedded data, and the tools that use what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from patchreg.benchmarks import earlyexit, localize
from patchreg.methods.anchornet.budget import fit_temperatures
from patchreg.methods.anchornet.table import ConfidenceTable
from patchreg.pictures import pictures
from patchreg.runner import run as engine
from patchreg.runner.api import load
from patchreg.utils.errors import CheckpointError, ConfigError, MissingFileError
from patchreg.utils.weights import load_file

ROOT = Path(__file__).resolve().parent.parent.parent

TRUNK = dict(type="AnchorNetBackbone", blocks=[(1, 8, 1), (2, 8, 1), (2, 8, 1)], out_channels=16)
ANCHOR = dict(
    type="AnchorNetClassifier",
    backbone=TRUNK,
    head=dict(type="AnchorNetCAMHead", num_classes=10, in_channels=16),
    selector=dict(type="CAMPatchSelector", num_patches=2, iou_limits=0.3),
)
NET = dict(
    backbone=dict(type="CIFARResNetBackbone", num_blocks=[1, 1, 1, 1], base_channels=4),
    head=dict(type="LinearHead", num_classes=10, in_channels=32, pool="mean"),
)
TRAINING = """_base_ = ["{base}/_base_/runtime.py", "{base}/_base_/datasets/cifar10_quick.py"]
model = {model}
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.05, momentum=0.9))
train_dataloader = dict(dataset=dict(data_root="nowhere", subset=512))
val_dataloader = dict(dataset=dict(data_root="nowhere", subset=100))
test_dataloader = dict(dataset=dict(data_root="nowhere", subset=100))
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=2)
val_cfg = dict()
test_cfg = dict()
"""
TESTING = """_base_ = ["{base}/_base_/runtime.py", "{base}/_base_/datasets/cifar10_quick.py"]
model = {model}
train_dataloader = None
val_dataloader = None
val_evaluator = None
test_dataloader = dict(batch_size=40, dataset=dict(data_root="nowhere", subset=100))
test_cfg = {loop}
{more}
"""


def pretrained(part: dict[str, Any], stage: str) -> dict[str, Any]:
    """A part with the weights of a stage."""
    path = f"work_dirs/{stage}/last.pth"
    return {**part, "init_cfg": dict(type="Pretrained", checkpoint=path)}


def ensemble(weights: bool) -> dict[str, Any]:
    """The three networks, with the weights of the stages or without."""
    parts = dict(
        anchor=ANCHOR,
        resized=dict(type="AnchorNetResizedClassifier", view_size=16, **NET),
        patch=dict(type="AnchorNetViewClassifier", **NET),
    )
    if weights:
        stages = dict(anchor="one", resized="two", patch="three")
        parts = {name: pretrained(part, stages[name]) for name, part in parts.items()}
    return dict(type="AnchorNetEnsembleClassifier", batch_size=16, **parts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all stages ran, small."""
    folder = tmp_path_factory.mktemp("anchornet")
    models = dict(
        one=ANCHOR,
        two=dict(type="AnchorNetResizedClassifier", view_size=16, **NET),
        three=dict(type="AnchorNetPatchClassifier", anchor=pretrained(ANCHOR, "one"), **NET),
    )
    base = os.path.relpath(ROOT / "configs", folder)
    for name, model in models.items():
        (folder / f"{name}.py").write_text(TRAINING.format(base=base, model=model))
    metric = 'test_evaluator = [dict(type="AnchorNetTableMetric")]'
    table = dict(type="AnchorNetTableLoop", setup="small")
    (folder / "four.py").write_text(
        TESTING.format(base=base, model=ensemble(True), loop=table, more=metric)
    )
    loop = dict(
        type="AnchorNetDynamicLoop",
        table="work_dirs/four/table.safetensors",
        image_size=32,
        budgets=[3e5, 6e5],
        execute=True,
    )
    load = 'load_from = "work_dirs/four/ensemble.pth"'
    (folder / "five.py").write_text(
        TESTING.format(base=base, model=ensemble(False), loop=loop, more=load)
    )
    stages = ["one.py", "two.py", "three.py", "four.py", "five.py"]
    (folder / "all.py").write_text(f'_base_ = ["{base}/_base_/runtime.py"]\nstages = {stages}\n')
    before = Path.cwd()
    os.chdir(folder)
    try:
        engine.train("all.py")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def there(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work dir of the finished stages, seen from its folder."""
    monkeypatch.chdir(finished)
    return finished / "work_dirs" / "all"


def test_stages_hand_their_weights_forward(there: Path) -> None:
    record = json.loads((there / "stages.json").read_text())
    assert [Path(name).stem for name in record] == ["one", "two", "three", "four", "five"]
    parts = {
        stage: load_file(next((there / stage).glob("epoch_2.pth")))["state_dict"]
        for stage in ("one", "two", "three")
    }
    assert not any(key.startswith("anchor.") for key in parts["three"])
    whole = load_file(there / "four" / "ensemble.pth")["state_dict"]
    for part, stage in (("anchor", "one"), ("resized", "two"), ("patch", "three")):
        for key, value in parts[stage].items():
            assert torch.equal(whole[f"{part}.{key}"], value)


def test_the_table_and_early_exit_agree(there: Path) -> None:
    table = ConfidenceTable.load(there / "four" / "table.safetensors")
    assert (len(table), table.stages, table.setup) == (100, 3, "small")
    official = torch.load(there / "four" / "table_official.pth", weights_only=True)
    assert torch.equal(official["thresholds"], table.confidence)
    report = json.loads((there / "five" / "dynamic.json").read_text())
    kinds = [row["kind"] for row in report["rows"]]
    assert kinds == ["thresholds"] * 3 + ["budget"] * 2
    for stage, row in enumerate(report["rows"][:3]):
        assert row["accuracy"] == pytest.approx(table.correct[:, stage].double().mean().item())
        assert row["cost"] == pytest.approx(table.costs[stage])
    for row in report["rows"][3:]:
        assert row["decisions_unlike_table"] == 0
        assert row["fitted_cost"] <= row["budget"]
        found = table.evaluate(row["thresholds"])
        assert row["executed_accuracy"] == pytest.approx(found.accuracy)
        assert row["executed_cost"] == pytest.approx(found.cost)
    header = (there / "five" / "dynamic.csv").read_text().split("\n")[0]
    assert "images_per_second" in header
    assert (there / "five" / "dynamic.png").stat().st_size > 5000


def test_a_stage_that_was_stopped_continues_to_the_same_weights(
    there: Path, tmp_path: Path
) -> None:
    moved = {"work_dirs/one": str(there / "one")}
    options = {"train_cfg.max_epochs": 1, "train_cfg.val_interval": 1}
    work = str(tmp_path / "three")
    engine.train("three.py", work_dir=work, options=options, moved=moved)
    engine.train("three.py", work_dir=work, resume="auto", moved=moved)
    again = load_file(tmp_path / "three" / "epoch_2.pth")["state_dict"]
    whole = load_file(there / "three" / "epoch_2.pth")["state_dict"]
    assert all(torch.equal(again[key], value) for key, value in whole.items())


def test_weights_of_another_stage_are_refused(there: Path, tmp_path: Path) -> None:
    wrong = {"model.anchor.init_cfg.checkpoint": str(there / "two" / "epoch_2.pth")}
    with pytest.raises(CheckpointError, match="does not belong to this model"):
        engine.train("three.py", work_dir=str(tmp_path / "a"), options=wrong)
    with pytest.raises(MissingFileError, match="work_dirs/one/last.pth"):
        engine.train("three.py", work_dir=str(tmp_path / "a"))
    moved = {"work_dirs/four": str(there / "four")}
    for options, text in (
        ({"test_cfg.unit": "watts"}, "unit='watts' is unknown"),
        ({"test_cfg.thresholds": [[0.5, 0.5, 0.5, 0.0]]}, "4 values for 3 stages"),
        ({"test_cfg.budgets": [10.0]}, "budget=10 cannot be met"),
        ({"test_cfg.calibrated": True}, "calibrated=False"),
    ):
        with pytest.raises(ConfigError, match=text):
            engine.evaluate("five.py", work_dir=str(tmp_path / "b"), options=options, moved=moved)


def test_budgets_in_milliseconds_and_calibration(there: Path, tmp_path: Path) -> None:
    moved = {"work_dirs/four": str(there / "four")}
    options = {
        "test_cfg.unit": "ms",
        "test_cfg.budgets": [1e3],
        "test_cfg.execute": False,
        "test_cfg.calibrated": True,
    }
    engine.evaluate("five.py", work_dir=str(tmp_path / "ms"), options=options, moved=moved)
    report = json.loads((tmp_path / "ms" / "dynamic.json").read_text())
    assert report["unit"] == "ms"
    assert 0 < report["costs"][0] < report["costs"][1] < report["costs"][2] < 1e3
    assert len(report["temperatures"]) == 3
    table = ConfidenceTable.load(there / "four" / "table.safetensors")
    assert tuple(report["temperatures"]) == fit_temperatures(table.halves(0)[0])


def test_a_table_of_the_authors_needs_neither_images_nor_weights(
    there: Path, tmp_path: Path
) -> None:
    own = ConfidenceTable.load(there / "four" / "table.safetensors")
    official = own.to_official()
    for name in ("thresholds", "predictions"):
        # One stage more than the model has.
        official[name] = torch.cat((official[name], official[name][:, -1:]), dim=1)
    torch.save(official, tmp_path / "theirs.pth")
    options = {
        "load_from": None,
        "test_dataloader.dataset.data_root": "gone",
        "test_cfg.table": str(tmp_path / "theirs.pth"),
        "test_cfg.execute": False,
    }
    engine.evaluate("five.py", work_dir=str(tmp_path / "out"), options=options)
    report = json.loads((tmp_path / "out" / "dynamic.json").read_text())
    assert report["costs"][:3] == pytest.approx(own.costs)
    assert report["costs"][3] - report["costs"][2] == pytest.approx(own.costs[2] - own.costs[1])
    assert [row["kind"] for row in report["rows"]] == ["thresholds"] * 4 + ["budget"] * 2
    with pytest.raises(ConfigError, match="has 4 stages, the model 3"):
        engine.evaluate(
            "five.py", work_dir=str(tmp_path / "ms"), options={**options, "test_cfg.unit": "ms"}
        )


def test_single_images_are_predicted_with_a_budget(there: Path, tmp_path: Path) -> None:
    checkpoint = str(there / "four")
    table = ConfidenceTable.load(there / "four" / "table.safetensors")
    all_views = load("five.py", checkpoint).predict("test", count=4, top=3)
    assert [one.record["stage"] for one in all_views] == [2] * 4
    assert all(len(one.record["boxes"]) == 2 for one in all_views)
    cheap = load("five.py", checkpoint, budget=table.costs[0]).predict("test", count=4)
    for one in cheap:
        assert (one.record["stage"], one.record["boxes"]) == (0, [])
        assert one.record["macs"] == table.costs[0]
        assert one.image.shape == (32, 32, 3)
        confidences = [entry["confidence"] for entry in one.record["classes"]]
        assert confidences == sorted(confidences, reverse=True)
    with pytest.raises(ConfigError, match="has no budget"):
        load("one.py", str(there / "one"), budget=1.0)
    with pytest.raises(ConfigError, match="top=0"):
        load("one.py", str(there / "one")).predict("test", top=0)
    with pytest.raises(ConfigError, match="no model of its own but 5 stages"):
        load("all.py", str(there / "one"))
    with pytest.raises(MissingFileError, match=r"gone\.jpg"):
        load("one.py", str(there / "one")).predict("gone.jpg")


def test_tools_write_json_and_pictures(there: Path, tmp_path: Path) -> None:
    from PIL import Image

    photo = tmp_path / "photo.png"
    Image.new("L", (50, 40), 99).save(photo)
    command = [str(ROOT / "tools/predict.py"), str(photo), "five.py", str(there / "four")]
    done = subprocess.run(
        [sys.executable, *command, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert json.loads(done.stdout[done.stdout.index("[\n") :])[0]["classes"] == record["classes"]
    assert record["image"] == str(photo)
    assert record["image_size"] == [32, 32]
    for x0, y0, x1, y1 in record["boxes"]:
        assert (x1 - x0, y1 - y0) == (15, 15)
        assert min(x0, y0) >= 0
    assert (tmp_path / "out" / "predictions.png").stat().st_size > 5000
    kinds = pictures()
    for name, extra in (("patches", ["test"]), ("earlyexit", [])):
        import argparse

        parser = argparse.ArgumentParser()
        kinds[name].add_arguments(name, parser)
        words = [*extra, "five.py", str(there / "four"), "--out", str(tmp_path / f"{name}.png")]
        if name == "earlyexit":
            single = ["--single", "one", "two.py", str(there / "two" / "epoch_2.pth")]
            words += ["--budgets", "3e5", "--images", "20", "--rounds", "1", *single]
        said = kinds[name].run(name, parser.parse_args(words))
        assert "written to" in said
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    rows = json.loads((tmp_path / "earlyexit.json").read_text())
    assert [row["kind"] for row in rows] == ["early exit", "single network"]
    assert all(row["ms"] > 0 and row["macs"] > 0 for row in rows)


def test_benchmarks_compare_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localize, "ROUNDS", 1)
    monkeypatch.setattr(localize, "REPEATS", 1)
    (row,) = localize.run("cpu")
    assert row["goal"] == 40.0
    assert row["ratio"] > 2

    def small(batch: int) -> Any:
        from patchreg.registry import MODELS

        parts = ensemble(False)
        parts["anchor"] = {**ANCHOR, "selector": dict(type="CAMPatchSelector", num_patches=4)}
        return MODELS.build({**parts, "batch_size": batch}).eval()

    monkeypatch.setattr(earlyexit, "ensemble", small)
    monkeypatch.setattr(earlyexit, "CPU", dict(images=40, batch=8, rounds=1))
    rows = earlyexit.run("cpu")
    assert rows[0]["goal"] == 0.95
    assert 1.2 < rows[0]["baseline"] < 2.6
    counts = [earlyexit.plan(1000).count(stage) for stage in range(5)]
    assert counts == [450, 200, 120, 100, 130]
