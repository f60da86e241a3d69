"""Curves, throughput, confusion matrices and the table of runs, on logs whose numbers are known."""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patchreg.analysis import analyses, confusion, curves, runs, throughput
from patchreg.analysis.facts import facts_of
from patchreg.analysis.log import read_runs
from patchreg.utils.errors import ConfigError, DataError, MissingFileError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
model = dict(type='ToyClassifier')
randomness = dict(seed=7)
train_cfg = dict(by_epoch=True, max_epochs={epochs})
train_dataloader = dict(batch_size=32)
"""


def trained(iteration: int, epoch: int, **values: float) -> dict[str, Any]:
    """A row of the training."""
    return dict(values, epoch=epoch, iter=iteration, step=iteration)


def write_run(
    folder: Path,
    *starts: list[dict[str, Any]],
    epochs: int = 3,
    processes: int = 2,
    seconds: int = 90,
) -> Path:
    """Write the folder of a run as the runner leaves it: config, and log and scalars of every start."""
    for number, rows in enumerate(starts):
        name = f"20260101_00000{number}"
        inner = folder / name / "vis_data"
        inner.mkdir(parents=True)
        lines = [json.dumps(row) for row in rows]
        if rows:
            (inner / "scalars.json").write_text("\n".join(lines) + "\n")
            (inner / f"{name}.json").write_text("\n".join(lines) + "\n")
        (folder / name / f"{name}.log").write_text(
            f"2026/01/01 00:00:00 - mmengine - INFO - device cpu, processes {processes}, seed 7\n"
            "a line that goes on\n"
            f"2026/01/01 00:{seconds // 60:02d}:{seconds % 60:02d} - mmengine - INFO - the end\n"
        )
    (folder / "toy.py").write_text(CONFIG.format(epochs=epochs))
    return folder


# Epochs of 120 iterations, logged every 50: 50 and 100, 170 and 220, 290 and 340.
FIRST = [
    trained(50, 1, loss=3.0, time=9.0, data_time=1.0),
    trained(100, 1, loss=2.0, time=0.2, data_time=0.02),
    {"accuracy/top1": 10.0, "time": 77.0, "step": 1},
    trained(170, 2, loss=1.9, time=0.2, data_time=0.1),
    trained(220, 2, loss=1.8, time=0.3, data_time=0.03),
    {"accuracy/top1": 30.0, "time": 77.0, "step": 2},
    trained(290, 3, loss=-5.0, time=0.2, data_time=0.02),
]
# Resumed after iteration 190, so without the first row of the second epoch.
SECOND = [
    trained(220, 2, loss=1.7, time=8.0, data_time=1.0),
    {"accuracy/top1": 40.0, "time": 77.0, "step": 2},
    trained(290, 3, loss=1.5, time=0.4, data_time=0.04),
    trained(340, 3, loss=1.4, time=0.6, data_time=0.06),
    {"accuracy/top1": 35.0, "time": 77.0, "step": 3},
]


def test_of_the_rows_of_a_step_the_last_one_counts(tmp_path: Path) -> None:
    (log,), notes = read_runs([write_run(tmp_path / "a", FIRST, SECOND)])
    assert not notes
    assert [(row.iteration, row.values["loss"]) for row in log.train] == [
        (50, 3.0),
        (100, 2.0),
        (170, 1.9),
        (220, 1.7),
        (290, 1.5),
        (340, 1.4),
    ]
    assert [(row.step, row.values["accuracy/top1"]) for row in log.val] == [
        (1, 10.0),
        (2, 40.0),
        (3, 35.0),
    ]


def test_a_resumed_run_replaces_the_end_that_it_has_not_reached_yet(tmp_path: Path) -> None:
    (log,), _ = read_runs([write_run(tmp_path / "a", FIRST, SECOND[:1])])
    assert [row.iteration for row in log.train] == [50, 100, 170, 220]
    assert [row.step for row in log.val] == [1]
    # A validation that was killed and repeated stands once.
    again = [*FIRST[:3], {"accuracy/top1": 11.0, "step": 1}]
    (log,), _ = read_runs([write_run(tmp_path / "b", FIRST[:3], again[3:])])
    assert [row.values["accuracy/top1"] for row in log.val] == [11.0]


def test_epochs_are_found_from_the_rows(tmp_path: Path) -> None:
    (log,), _ = read_runs([write_run(tmp_path / "a", FIRST, SECOND)])
    assert (log.interval, log.epoch_length) == (50, 120)
    # Without the first row of the second epoch, the third one still tells.
    (late,), _ = read_runs([write_run(tmp_path / "b", [*FIRST[:2], *SECOND])])
    assert late.epoch_length == 120
    assert log.curve("loss", False, by_epoch=False)[0] == (50.0, 3.0)
    assert log.curve("accuracy/top1", True, by_epoch=False)[1] == (240.0, 40.0)
    assert log.curve("accuracy/top1", True, by_epoch=True) == [
        (1.0, 10.0),
        (2.0, 40.0),
        (3.0, 35.0),
    ]
    assert log.curve("loss", False, by_epoch=True)[-1] == (340 / 120, 1.4)
    # One epoch does not tell its length: a validation stands where the training was.
    (short,), _ = read_runs([write_run(tmp_path / "c", FIRST[:3])])
    assert short.epoch_length is None
    assert short.curve("accuracy/top1", True, by_epoch=False) == [(100.0, 10.0)]
    # Validations counted in iterations stay where they are.
    rows = [row if "iter" in row else {**row, "step": 120 * row["step"]} for row in FIRST[:6]]
    (counted,), _ = read_runs([write_run(tmp_path / "d", rows)])
    assert counted.curve("accuracy/top1", True, by_epoch=False) == [(120.0, 10.0), (240.0, 30.0)]


def test_throughput_leaves_out_the_begin_of_every_start(tmp_path: Path) -> None:
    (log,), _ = read_runs([write_run(tmp_path / "a", FIRST, SECOND)])
    found = throughput.measure(log, warmup=50)
    # Left: 0.2, 0.2 of the first start, 0.4 and 0.6 of the second.
    assert (found.rows, found.left_out) == (4, 2)
    assert found.seconds == pytest.approx((0.2, 0.3, 0.54))
    assert found.data_share == pytest.approx(0.1)
    assert found.batch == 64
    everything = throughput.measure(log, warmup=0)
    assert (everything.rows, everything.left_out) == (6, 0)
    assert everything.seconds[1] == pytest.approx(0.5)
    words = throughput.table([found]).splitlines()[1].split()
    assert words[:6] == [
        log.label,
        "213.3",
        "0.3000",
        "0.2000",
        "0.5400",
        "10.0",
    ]
    with pytest.raises(
        DataError, match=r"first 500 iterations of a start; give a smaller --warmup"
    ):
        throughput.measure(log, warmup=500)


def test_throughput_of_a_copied_log_needs_the_batch_size(tmp_path: Path) -> None:
    file = tmp_path / "log.json"
    file.write_text("\n".join(json.dumps(row) for row in FIRST))
    arguments = argparse.Namespace(runs=[file], warmup=50, batch_size=None)
    assert "needs --batch-size" in throughput.run(arguments)
    arguments.batch_size = 20
    assert " 100.0 " in throughput.run(arguments)
    file.write_text(json.dumps(trained(50, 1, loss=1.0)))
    with pytest.raises(DataError, match="none of the runs has times of training"):
        throughput.run(arguments)


def test_pictures_hold_every_run_and_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "a", FIRST, SECOND)
    write_run(tmp_path / "b", FIRST)
    kept: list[Any] = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, path: kept.append(figure))
    arguments = argparse.Namespace(
        runs=[tmp_path / "a", tmp_path / "b"], keys=None, out=str(tmp_path / "c.png")
    )
    assert "2 runs, loss, accuracy/top1: written to" in curves.run(arguments)
    panels = kept[0].axes
    assert [panel.get_title() for panel in panels] == ["loss", "accuracy/top1"]
    assert [panel.get_xlabel() for panel in panels] == ["epoch", "epoch"]
    assert [panel.get_ylabel() for panel in panels] == ["", "%"]
    assert panels[1].lines[0].get_xydata().tolist() == [[1.0, 10.0], [2.0, 40.0], [3.0, 35.0]]
    assert panels[1].lines[1].get_ydata().tolist() == [10.0, 30.0]
    legend = [text.get_text() for text in kept[0].legends[0].get_texts()]
    assert legend == ["a", "b"]
    arguments.keys = ["time"]
    curves.run(arguments)
    # Of the validations' times nothing is drawn, and the pause of the second start lies above.
    assert [len(line.get_xdata()) for line in kept[1].axes[0].lines] == [6, 5]


def test_stages_and_copied_logs_are_runs_of_their_own(tmp_path: Path) -> None:
    rows = [{**row, "stage": "one"} for row in FIRST] + [{**row, "stage": "two"} for row in SECOND]
    (tmp_path / "copy.json").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "table.json").write_text('[\n {\n  "label": 1\n }\n]\n')
    found, notes = read_runs([tmp_path])
    name = f"{tmp_path.name}/copy"
    assert [log.label for log in found] == [f"{name}: one", f"{name}: two"]
    assert [log.train[-1].values["loss"] for log in found] == [-5.0, 1.4]
    assert notes == [f"'{tmp_path / 'table.json'}' holds no lines of scalars; skipped"]
    write_run(tmp_path / "all" / "second", SECOND)
    write_run(tmp_path / "all" / "first", FIRST)
    (tmp_path / "all" / "stages.json").write_text("{}")
    assert len(read_runs([tmp_path / "all"])[0]) == 2
    real, _ = read_runs([ROOT / "docs/runs/dge_quick"])
    assert {log.epoch_length for log in real} == {390}


def test_wrong_inputs_are_told_in_words(tmp_path: Path) -> None:
    run = write_run(tmp_path / "quick", FIRST)
    with pytest.raises(MissingFileError, match=r"quik' does not exist\. Did you mean 'quick'"):
        read_runs([tmp_path / "quik"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no scalars; give the work dir of a run"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(DataError, match="holds no runs"):
        runs.summaries(tmp_path / "empty")
    with pytest.raises(MissingFileError, match="does not exist"):
        runs.summaries(tmp_path / "none")
    (tmp_path / "report.json").write_text('{\n "a": 1\n}\n')
    with pytest.raises(DataError, match=r"one JSON object with 'step' per line.*3 lines"):
        read_runs([tmp_path / "report.json"])
    log, _ = read_runs([run])
    with pytest.raises(ConfigError, match=r"--keys los: .*Did you mean 'loss'.*data_time"):
        curves.check_keys(["los"], log)
    with pytest.raises(ConfigError, match=r"expected a file ending in \.png"):
        curves.run(argparse.Namespace(runs=[run], keys=None, out="curves.xyz"))
    with pytest.raises(ConfigError, match=r"--metric acc/top1: .*'accuracy/top1'"):
        runs.summaries(tmp_path, "acc/top1")
    with pytest.raises(ConfigError, match="expected 0 iterations or more"):
        throughput.run(argparse.Namespace(runs=[run], warmup=-1, batch_size=None))


def test_damaged_lines_are_reported_and_skipped(tmp_path: Path) -> None:
    file = tmp_path / "log.json"
    good = json.dumps(trained(50, 1, loss=1.0))
    file.write_text(f'{good}\n{{"loss": 2.0, "st\n\n{{"loss": 3.0}}\n')
    (log,), notes = read_runs([file])
    assert len(log.train) == 1
    assert len(notes) == 2
    assert notes[0].startswith(f"'{file}' line 2 is damaged (")
    assert notes[1] == f"'{file}' line 4 has no 'step'; skipped"


def test_table_of_runs_tells_how_far_each_is(tmp_path: Path) -> None:
    done = write_run(tmp_path / "done", FIRST, SECOND)
    (done / "epoch_3.pth").write_bytes(b"x" * 2_500_000)
    stopped = write_run(tmp_path / "stopped", FIRST[:5], epochs=8)
    (stopped / "iter_240.pth").write_bytes(b"x")
    write_run(tmp_path / "deep" / "running", FIRST[:5], epochs=8)
    tested = write_run(tmp_path / "tested", [])
    (tested / "20260101_000000" / "20260101_000000.json").write_text('{"knn/top1": 12.5}')
    failed = write_run(tmp_path / "failed", [])
    write_run(tmp_path / "begun", [])
    for item in (*stopped.rglob("*"), *failed.rglob("*")):
        os.utime(item, (0, 0))
    found, notes = runs.summaries(tmp_path)
    assert not notes
    by_name = {one.run: one for one in found}
    one = by_name["done"]
    assert (one.state, one.done, one.planned, one.unit) == ("finished", 3.0, 3, "epochs")
    assert (one.config, one.model, one.seed) == ("toy", "ToyClassifier", 7)
    assert (one.best, one.best_at, one.last) == (40.0, 2, 35.0)
    assert (one.seconds, one.megabytes) == (180.0, 2.5)
    assert (by_name["stopped"].state, by_name["stopped"].done) == ("stopped", 2.0)
    assert by_name[os.path.join("deep", "running")].state == "running?"
    assert by_name[os.path.join("deep", "running")].done == pytest.approx(220 / 120)
    one = by_name["tested"]
    assert (one.state, one.metric, one.last, one.done) == ("evaluated", "knn/top1", 12.5, None)
    assert by_name["failed"].state == "no scalars"
    assert by_name["begun"].state == "running?"
    assert "1.8 of 8" in runs.table(found)
    out = tmp_path / "out" / "runs.csv"
    arguments = argparse.Namespace(folder=tmp_path, metric=None, csv=out)
    assert runs.run(arguments) == f"{runs.table(found)}\nwritten to {out}"
    with out.open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert (rows["done"]["best"], rows["done"]["state"]) == ("40.0", "finished")
    assert rows["failed"]["best"] == ""
    # A folder may be a run itself, and of some metrics the least value is the best one.
    lossy = [*FIRST[:2], {"loss": 3.0, "step": 1}, *FIRST[3:5], {"loss": 4.0, "step": 2}]
    (one,), _ = runs.summaries(write_run(tmp_path / "lossy", lossy), "loss")
    assert (one.run, one.best, one.best_at, one.last) == ("lossy", 3.0, 1, 4.0)


def test_what_a_folder_tells_survives_a_broken_config(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", FIRST, seconds=30)
    (folder / "toy.py").write_text("model = dict(")
    facts = facts_of(folder)
    assert (facts.config, facts.model, facts.seed, facts.seconds) == ("toy", None, 7, 30.0)
    assert (facts.processes, facts.batch_size) == (2, None)


class MadeSample(dict):
    """As much of a data sample as is asked for."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class MadePredictor:
    """Says what its images say; classes by their first value."""

    def test_step(self, batch: dict[str, Any]) -> list[MadeSample]:
        """Return one answer per image."""
        return [
            MadeSample(pred_label=torch.tensor([int(x)]), pred_score=torch.zeros(4))
            for x in batch["inputs"]
        ]


def batches(pairs: list[tuple[int, int]], size: int) -> list[dict[str, Any]]:
    """Batches whose images have given (true, predicted) classes."""
    made = []
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        samples = [MadeSample(gt_label=torch.tensor([true])) for true, _ in part]
        made.append(dict(inputs=torch.tensor([p for _, p in part]), data_samples=samples))
    return made


PAIRS = [(0, 0)] * 3 + [(0, 1)] * 5 + [(1, 1)] * 4 + [(1, 0)] * 1 + [(2, 1)] * 2


def test_confusion_of_a_made_predictor(tmp_path: Path) -> None:
    found = confusion.count_mistakes(
        MadePredictor(), batches(PAIRS, 4), ["cat", "dog, hound", "emu"]
    )
    assert found.counts.tolist() == [[3, 5, 0, 0], [1, 4, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]]
    assert found.names == ["cat", "dog", "emu", "3"]
    assert found.accuracy == pytest.approx(100 * 7 / 15)
    assert found.pairs(9) == [
        ("cat", "dog", 5, 62.5),
        ("emu", "dog", 2, 100.0),
        ("dog", "cat", 1, 20.0),
    ]
    recall = [one[2] for one in found.by_class()]
    precision = [one[3] for one in found.by_class()]
    assert recall[:3] == [37.5, 80.0, 0.0]
    assert precision[0] == 75.0
    assert precision[1] == pytest.approx(100 * 4 / 11)
    # Never seen, never answered: not a number instead of 0 %.
    assert np.isnan([recall[3], precision[2]]).all()
    confusion.write_csv(found, tmp_path / "a" / "c.csv")
    with (tmp_path / "a" / "c.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["true \\ predicted", "cat", "dog", "emu", "3"]
    assert rows[2] == ["dog", "1", "4", "0", "0"]
    text = confusion.report(found, 2)
    assert "top-1 46.67 % of 15 images, 4 classes" in text
    assert text.index("emu") < text.index("cat ")
    confusion.draw(found, tmp_path / "a" / "c.png")
    assert (tmp_path / "a" / "c.png").stat().st_size > 5000


def test_confusion_of_many_classes_draws_the_most_confused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = np.eye(300, dtype=np.int64) * 10
    counts[280, 7] = 5
    counts[3, 290] = 4
    kept: list[Any] = []
    monkeypatch.setattr(confusion, "save_figure", lambda figure, path: kept.append(figure))
    found = confusion.Confusion(counts, [f"class{k}" for k in range(300)])
    confusion.draw(found, tmp_path / "c.png")
    names = [label.get_text() for label in kept[0].axes[0].get_yticklabels()]
    assert names == ["class3", "class7", "class280", "class290"]


def test_confusion_refuses_what_has_no_classes() -> None:
    class Extractor(MadePredictor):
        def test_step(self, batch: dict[str, Any]) -> list[MadeSample]:
            return [MadeSample(feature=torch.zeros(2)) for _ in batch["inputs"]]

    with pytest.raises(ConfigError, match="Extractor gives features, not classes"):
        confusion.count_mistakes(Extractor(), batches(PAIRS, 4))
    nameless = [dict(inputs=torch.zeros(1), data_samples=[MadeSample()])]
    with pytest.raises(DataError, match="no single label per image"):
        confusion.count_mistakes(MadePredictor(), nameless)


def test_confusion_on_other_classes_than_trained_for_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "other.py"
    config.write_text(
        f"_base_ = ['{ROOT}/configs/dge/dense_quick.py']\n"
        "test_dataloader = dict(dataset=dict(data_root='nowhere'))\n"
    )
    checkpoint = str(ROOT / "configs/dge/checkpoints/dense_quick.pth")
    with pytest.raises(DataError, match=r"trained for airplane, .*test set here has T-shirt/top"):
        confusion.confusion_of(str(config), checkpoint)


def test_the_tool_has_all_analyses_and_one_message_per_mistake(tmp_path: Path) -> None:
    assert list(analyses()) == ["confusion", "curves", "runs", "throughput"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/analyze.py"), "curves", "nowhere"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: run 'nowhere' does not exist.\n"
    assert not list(tmp_path.iterdir())
