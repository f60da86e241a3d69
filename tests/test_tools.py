"""Comparison, picture and benchmark tools on a small run of the embedded data."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from patchreg import benchmarks
from patchreg.pictures.granularity import draw_granularity
from patchreg.runner import run as engine
from patchreg.runner.compare import Entry, compare, table, write_csv
from patchreg.utils.errors import CheckpointError, ConfigError, DataError, MissingFileError

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "model.backbone.arch": dict(embed_dims=16, depth=2, num_heads=2),
    "model.head.in_channels": 16,
    "train_dataloader.dataset.data_root": "nowhere",
    "val_dataloader.dataset.data_root": "nowhere",
    "test_dataloader.dataset.data_root": "nowhere",
}
BRIEF = {
    "train_dataloader.dataset.subset": 2000,
    "train_cfg.max_epochs": 1,
    "param_scheduler.total_steps": 1,
    "param_scheduler.end": 1,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small trained DGE and its dense twin."""
    folder = tmp_path_factory.mktemp("runs")
    # A dear budget, so that the routers leave their all-fine start within a few steps.
    strict = {"model.budget_loss.loss_weight": 100.0, "param_scheduler.eta_max": 0.05}
    for name, more in (("quick", strict), ("dense_quick", {})):
        engine.train(
            str(ROOT / f"configs/dge/{name}.py"),
            work_dir=str(folder / name),
            options={**SMALL, **BRIEF, **more},
        )
    return folder


def entries(runs: Path) -> list[Entry]:
    """The three rows of the quick start."""
    quick = str(ROOT / "configs/dge/quick.py")
    dense = {**SMALL, "model.backbone.eval_path": "dense"}
    return [
        Entry("twin", str(ROOT / "configs/dge/dense_quick.py"), str(runs / "dense_quick"), SMALL),
        Entry("dense gates", quick, str(runs / "quick"), dense),
        Entry("sparse", quick, str(runs / "quick"), SMALL),
    ]


def test_comparison_measures_all_rows_on_the_same_images(runs: Path, tmp_path: Path) -> None:
    found = compare(entries(runs), rounds=2, batch_size=16)
    rows, how = found.rows, found.how
    assert [row.images for row in rows] == [500, 500, 500]
    assert rows[0].mac_ratio == 1.0
    assert rows[1].mac_ratio > 1.1
    assert rows[2].mac_ratio < 1.0
    assert rows[1].top1 == rows[2].top1
    assert rows[2].same_as == "dense gates"
    assert rows[2].same_predictions == 500
    assert rows[0].speed == 1.0
    assert all(row.images_per_second > 0 for row in rows)
    assert "500 test images" in how
    assert "'sparse' predicts as 'dense gates' on 500 of 500 images" in table(rows)
    write_csv(rows, tmp_path / "made" / "rows.csv")
    with (tmp_path / "made" / "rows.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["top1"]) for row in read] == [row.top1 for row in rows]


def test_comparison_refuses_what_cannot_be_compared(runs: Path) -> None:
    first, _, last = entries(runs)
    other = {**last.options, "test_dataloader.dataset.subset": 100}
    with pytest.raises(ConfigError, match="tested on another data set"):
        compare([first, Entry("less", last.config, last.checkpoint, other)])
    with pytest.raises(CheckpointError, match="does not belong to this model"):
        compare([Entry("mixed up", first.config, last.checkpoint, SMALL)])
    with pytest.raises(MissingFileError, match="nowhere"):
        compare([Entry("gone", first.config, "nowhere.pth", SMALL)])
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare([])


@pytest.fixture
def small_config(tmp_path: Path) -> str:
    """The small model as a config file, for tools that take no overrides."""
    path = tmp_path / "small.py"
    root = 'dataset=dict(data_root="nowhere")'
    path.write_text(
        f'_base_ = ["{ROOT}/configs/dge/quick.py"]\n'
        "model = dict(backbone=dict(arch=dict(embed_dims=16, depth=2, num_heads=2)), "
        "head=dict(in_channels=16))\n"
        f"train_dataloader = dict({root})\nval_dataloader = dict({root})\n"
        f"test_dataloader = dict({root})\n"
    )
    return str(path)


def test_picture_of_the_test_set_and_of_files(
    runs: Path, tmp_path: Path, small_config: str
) -> None:
    from PIL import Image

    out = tmp_path / "a" / "set.png"
    draw_granularity("test", small_config, str(runs / "quick"), str(out), count=3)
    twin = Path(small_config).with_name("twin.py")
    twin.write_text(Path(small_config).read_text().replace("quick.py", "dense_quick.py"))
    flat = tmp_path / "twin.png"
    draw_granularity("test", str(twin), str(runs / "dense_quick"), str(flat), count=3)
    # Image, mean and two blocks; a model without routers has nothing to tell block by block.
    with Image.open(out) as picture, Image.open(flat) as plain:
        assert plain.width == picture.width
        assert plain.width > plain.height
        assert picture.height > 1.7 * plain.height
    photos = tmp_path / "photos"
    photos.mkdir()
    with pytest.raises(DataError, match="holds no image"):
        draw_granularity(str(photos), small_config, str(runs / "quick"), str(out))
    Image.new("RGB", (50, 40), (200, 10, 10)).save(photos / "one.png")
    again = tmp_path / "files.png"
    draw_granularity(str(photos), small_config, str(runs / "quick"), str(again))
    assert again.stat().st_size > 2000
    with pytest.raises(MissingFileError, match=r"image 'none\.jpg' does not exist"):
        draw_granularity("none.jpg", small_config, str(runs / "quick"), str(out))
    with pytest.raises(ConfigError, match="expected a file ending in"):
        draw_granularity("test", small_config, str(runs / "quick"), "picture.xyz")


def test_benchmarks_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"runner", "ops"} <= set(benchmarks.names())
    with pytest.raises(ConfigError, match="Did you mean 'runner'"):
        benchmarks.run("runer", "cpu")
    met = benchmarks.figure("m", 1.0, "s", baseline=2.0, ratio=0.5, goal=0.6)
    missed = benchmarks.figure("m", 1.0, "s", baseline=2.0, ratio=0.5, goal=0.6, at_most=False)
    assert (met["ok"], missed["ok"]) == (True, False)


def test_benchmark_tool_writes_its_figures(tmp_path: Path) -> None:
    code = (
        "import sys, runpy\n"
        "from patchreg import benchmarks\n"
        "import patchreg.benchmarks.runner as runner\n"
        "runner.ITERATIONS, runner.ROUNDS = 5, 1\n"
        "sys.argv = ['benchmark.py', 'runner', '--json', 'out/figures.json']\n"
        f"runpy.run_path({str(ROOT / 'tools/benchmark.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    # Five iterations say nothing about the goal, so both exit codes are right here.
    assert done.returncode in (0, 1), done.stderr
    rows = json.loads((tmp_path / "out/figures.json").read_text())
    assert set(rows[0]) == {"metric", "value", "unit", "baseline", "ratio", "goal", "ok"}
    assert rows[0]["goal"] == 1.05
    assert "iteration, engine against MMEngine's Runner" in done.stdout
