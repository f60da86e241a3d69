"""Comparisons: settings of a knob, the page, its commands, and the models that come along."""

from __future__ import annotations

import base64
import csv
import importlib.util
import re
import shlex
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from patchreg.runner.compare import (
    Comparison,
    Entry,
    Look,
    Row,
    compare,
    declared,
    table,
    write_csv,
)
from patchreg.runner.report import write_report
from patchreg.structures import PatchSelection
from patchreg.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def tool():
    spec = importlib.util.spec_from_file_location("compare_tool", ROOT / "tools/compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(label: str, value: object, top1: float, speed: float) -> Row:
    return Row(label, value, top1, 100, 2e6, 0.5, 0.25, 1000 * speed, speed)


def test_every_setting_is_a_row_and_says_how_to_get_it() -> None:
    entry = Entry("a b", "c.py", "d.pth", {"model.x": [1, 2]}, "model.k", (0.5, 8))
    points = entry.points()
    assert [point.options["model.k"] for point in points] == [0.5, 8]
    for point in points:
        words = shlex.split(point.command())
        assert words[:4] == ["python", "tools/compare.py", "--run", "a b"]
        again = tool().entry_of(words[3:])
        assert (again.config, again.checkpoint, again.options) == ("c.py", "d.pth", point.options)
    swept = tool().entry_of(["a", "c.py", "-", "sweep.budget=22e6,28e6"])
    assert swept.checkpoint is None
    assert [point.options for point in swept.points()] == [{"budget": 22e6}, {"budget": 28e6}]
    with pytest.raises(ConfigError, match="no values"):
        replace(entry, values=()).points()
    for words in (["a", "b"], ["a", "b", "c", "d"], ["a", "b", "c", "sweep.x=1", "sweep.y=2"]):
        with pytest.raises(ConfigError, match="--run"):
            tool().entry_of(words)


@pytest.fixture(scope="module")
def found() -> Comparison:
    """The models that come along, one setting of each, on few images."""
    entries = [
        replace(entry, config=str(ROOT / entry.config), values=entry.values[1:2])
        for entry in declared(ROOT / "configs")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return compare(entries, rounds=1, batch_size=8, images=64)


def test_shipped_models_compare(found: Comparison) -> None:
    rows = {row.label: row for row in found.rows}
    assert {"dense ViT", "ToMe", "DGE", "PatchDrop", "AnchorNet"} < set(rows)
    assert sum(" + " in label for label in rows) >= 3
    dense = rows["dense ViT"]
    assert dense.speed == 1.0
    assert dense.seen == 1.0
    assert dense.mac_ratio == 1.0
    assert rows["DGE"].mac_ratio == pytest.approx(0.6, abs=0.03)
    assert rows["ToMe"].mac_ratio == pytest.approx(0.6, abs=0.05)
    # Six of sixteen patches, the others at a sixteenth of the pixels.
    assert rows["PatchDrop"].seen == pytest.approx((6 + 10 / 16) / 16)
    assert rows["random + ViT"].seen == pytest.approx(0.25)
    # Ranking costs, on top of the same classifier on the same number of patches.
    assert rows["PatchGame ranks + ViT"].macs > rows["random + ViT"].macs
    assert all(row.images == 64 for row in found.rows)
    assert len(found.looks) == len(found.rows)
    assert found.images.shape == (8, 32, 32, 3)
    assert any(row.best for row in found.rows)


@pytest.mark.parametrize("label", ["DGE", "AnchorNet", "random + ViT"])
def test_the_command_of_a_row_gives_the_row(
    found: Comparison, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = next(row for row in found.rows if row.label == label)
    words = shlex.split(row.command)
    assert words[-6:] == ["--rounds", "1", "--batch-size", "8", "--images", "64"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*words[1:], "--out", str(tmp_path)])
    tool().main()
    with (tmp_path / "comparison.csv").open() as file:
        (again,) = csv.DictReader(file)
    # Seeds reach random choices too, so all figures but the times are the same.
    assert float(again["top1"]) == pytest.approx(row.top1)
    assert float(again["macs"]) == pytest.approx(row.macs)
    assert float(again["seen"]) == pytest.approx(row.seen)


def test_page_holds_the_figures_and_pictures(found: Comparison, tmp_path: Path) -> None:
    page = write_report(found, tmp_path / "out", "A <title>").read_text()
    write_csv(found.rows, tmp_path / "out" / "comparison.csv")
    with (tmp_path / "out" / "comparison.csv").open() as file:
        read = list(csv.DictReader(file))
    cells = re.findall(r"<tr[^>]*><td>(.*?)</td><td>([\d.]+)</td><td>([\d.]+)</td>", page)
    assert [
        (name, f"{float(r['top1']):.2f}", f"{float(r['macs']) / 1e6:.1f}")
        for (name, _, _), r in zip(cells, read)
    ] == cells
    assert "A &lt;title&gt;" in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(text)[:4] for text in pictures] == [b"\x89PNG"] * 2
    assert "http" not in page.split("<style>")[0]
    for entry in found.rows:
        assert entry.command.split()[1] == "tools/compare.py"
        assert entry.name in table(found.rows)
    open_tags: list[str] = []

    class Check(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Check().feed(page)
    assert open_tags == []


def test_best_rows_are_those_that_no_other_beats(tmp_path: Path) -> None:
    selection = PatchSelection.of_all((8, 8), (2, 2), torch.ones(1, 4))
    rows = [row("slow", "", 90.0, 1.0), row("worse", 2, 80.0, 1.0), row("fast", 22e6, 70.0, 3.0)]
    assert [item.name for item in rows] == ["slow", "worse 2", "fast 22M"]
    found = Comparison(
        rows=rows,
        how="by hand",
        images=torch.zeros(1, 8, 8, 3, dtype=torch.uint8).numpy(),
        truth=torch.tensor([1]),
        classes=["cat", "dog"],
        looks=[Look("slow", selection, torch.tensor([0]))],
    )
    assert "slow" in write_report(found, tmp_path).read_text()


def test_models_without_a_knob_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    dense = Entry("dense", "configs/dge/dense_quick.py", "configs/dge/checkpoints/dense_quick.pth")
    with pytest.raises(ConfigError, match="no budget to set"):
        compare([replace(dense, options={"budget": 1e6})], images=8)
    with pytest.raises(ConfigError, match="at least 1"):
        compare([dense], rounds=0)
    with pytest.raises(ConfigError, match="no config in"):
        declared(ROOT / "docs")
