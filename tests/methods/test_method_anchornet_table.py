"""Tables, thresholds, budgets and calibration against the authors' numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from anchornet_helpers import close, golden
from safetensors.torch import save_file

from patchreg.methods.anchornet.budget import (
    calibrate,
    calibration_error,
    fit_temperatures,
    solve_and_report,
    solve_thresholds,
)
from patchreg.methods.anchornet.table import ConfidenceTable, stage_costs
from patchreg.utils.errors import CheckpointError, ConfigError, DataError, MissingFileError

OFFICIAL = dict(resized=0.79, anchor=0.06, patch=0.79)


def small_table() -> tuple[ConfidenceTable, Any]:
    """The table that the authors' code makes of 96 samples."""
    file = golden("tables")
    windows = file["patch_logits"].unflatten(0, (96, 4))
    views = torch.cat((file["resized_logits"].unsqueeze(1), windows), dim=1)
    return ConfidenceTable.from_logits(
        views, file["target"], stage_costs(**OFFICIAL, stages=5)
    ), file


def real_table(anchor: float = 0.06) -> ConfidenceTable:
    """The published table of DenseNet-201; read from the full set only, it has no licence."""
    file = golden("real_table")
    costs = stage_costs(0.79, anchor, 0.79, 6)
    loaded = {"setup": "published", **{name: file[name] for name in ("thresholds", "predictions")}}
    return ConfidenceTable.from_official(loaded, costs)


def test_a_table_is_the_published_one() -> None:
    table, file = small_table()
    assert close(table.confidence, file["thresholds"], 1e-5)
    assert torch.equal(table.predicted, file["predicted_class"])
    assert torch.equal(table.correct, file["predictions"])
    best = table.logits.topk(5, dim=2).indices == file["target"][:, None, None]
    counts = torch.stack((best[..., 0].sum(0), best.any(2).sum(0)), dim=1)
    assert torch.equal(counts.float(), file["stage_top1_top5_correct"])
    assert torch.equal(counts[-1].float(), file["final_top1_top5_correct"])


def test_stopping_early_gives_the_published_counts() -> None:
    table, file = small_table()
    # The file writes 1.1 for 'never', which 1 means as well and which is refused here.
    for number, row in enumerate(file["dyn_rows"].clamp(max=1).tolist()):
        found = table.evaluate(row)
        assert found.exits == file["dyn_exit_count"][number].tolist()
        assert found.correct == file["dyn_correct_count"][number].tolist()
        assert found.forced == file["dyn_unresolved"][number]
        pairs = {
            "official_accuracy": "dyn_acc_over_exited",
            "official_cost": "dyn_gflops_exited_over_N",
            "accuracy": "dyn_acc_last_stage_forced",
            "cost": "dyn_gflops_last_stage_forced",
        }
        for name, golden_name in pairs.items():
            assert abs(getattr(found, name) - file[golden_name][number]) <= 1e-9, name


def test_all_published_rows_come_out() -> None:
    file, table = golden("dynamic_real"), real_table()
    dear = real_table(0.08)
    for number, (row, count) in enumerate(
        zip(file["thresholds"].tolist(), file["num_stages"].tolist(), strict=True)
    ):
        found, priced = table.evaluate(row[:count]), dear.evaluate(row[:count])
        assert found.exits == file["exit_count"][number].tolist()
        assert found.correct == file["correct_count"][number].tolist()
        assert found.forced == file["unresolved"][number] == 0
        assert abs(found.accuracy - file["acc"][number]) <= 1e-12
        assert abs(found.cost - file["gflops_anchor_0p06"][number]) <= 1e-9
        assert abs(priced.cost - file["gflops_anchor_0p08"][number]) <= 1e-9
        assert round(found.accuracy, 4) == file["published_acc"][number]
        assert round(priced.cost, 2) == file["published_gflops"][number]
    for stage, accuracy in enumerate(file["static_stage_acc"].tolist()):
        row = [1.0] * stage + [0.0]
        assert abs(table.evaluate(row).accuracy - accuracy) <= 1e-12


@pytest.mark.parametrize(
    ("budget", "goal"), [(0.85, 0.710), (1.00, 0.727), (1.20, 0.739), (1.50, 0.746)]
)
def test_budgets_are_met_on_images_that_the_solver_has_not_seen(budget: float, goal: float) -> None:
    table = real_table()
    found = [solve_and_report(table, budget, seed) for seed in range(5)]
    accuracy = sum(one.held_out.accuracy for one in found) / 5
    cost = sum(one.held_out.cost for one in found) / 5
    assert accuracy >= goal
    assert abs(cost - budget) <= 0.01 * budget
    assert all(one.fitted.cost <= budget for one in found)


def drawn_table(images: int = 400, stages: int = 3, seed: int = 0) -> ConfidenceTable:
    """A table of random logits that are right more often the more views there are."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 6, (images,), generator=generator)
    views = torch.randn(images, stages, 6, generator=generator)
    ease = torch.rand(images, 1, generator=generator) * 2
    views.scatter_add_(
        2, labels[:, None, None].expand(-1, stages, 1), ease[..., None].expand(-1, stages, 1)
    )
    return ConfidenceTable.from_logits(views, labels, stage_costs(1.0, 0.1, 1.0, stages))


def test_the_solver_finds_what_an_exhaustive_search_finds() -> None:
    table = drawn_table()
    grid = torch.linspace(0, 1, 60).tolist()
    for budget in (1.3, 1.7, 2.2):
        best = max(
            found.accuracy
            for first in grid
            for second in grid
            if (found := table.evaluate([first, second, 0.0])).cost <= budget
        )
        mine = table.evaluate(solve_thresholds(table, budget))
        assert mine.cost <= budget
        assert mine.accuracy >= best - 0.005
    assert table.evaluate(solve_thresholds(table, 1.0)).exits == [400, 0, 0]
    everything = table.evaluate(solve_thresholds(table, 99.0)).accuracy
    assert everything >= table.correct[:, -1].double().mean()
    with pytest.raises(ConfigError, match=r"budget=0.5 .* choose a budget from 1 on"):
        solve_thresholds(table, 0.5)
    with pytest.raises(ConfigError, match="budget=nan"):
        solve_thresholds(table, float("nan"))


def test_tables_that_cannot_be_true() -> None:
    loaded = dict(thresholds=torch.rand(4, 2), predictions=torch.tensor([[3, 1]] * 4))
    with pytest.raises(DataError, match="predictions hold 3; expected whether each stage is right"):
        ConfidenceTable.from_official(loaded, (1.0, 2.0))
    loaded["predictions"] = torch.tensor([[0, 1]] * 4)
    assert ConfidenceTable.from_official(loaded, (1.0, 2.0)).correct.sum() == 4
    for costs in ((1.0, float("nan")), (-1.0, 2.0)):
        with pytest.raises(DataError, match="expected numbers from 0 on"):
            ConfidenceTable.from_official(loaded, costs)


def test_missing_windows_cost_nothing_and_count_at_the_last_one_there_is() -> None:
    views = torch.tensor(
        [[[1.0, 0.0], [0.0, 3.0], [9.0, 9.0]], [[1.0, 0.0], [0.0, 3.0], [0.0, 3.0]]]
    )
    seen = torch.tensor([[True, True, False], [True, True, True]])
    table = ConfidenceTable.from_logits(
        views, torch.tensor([1, 1]), stage_costs(1.0, 0.5, 2.0, 3), seen
    )
    assert table.costs == (1.0, 3.5, 5.5)
    assert torch.equal(table.confidence[0, 2], table.confidence[0, 1])
    found = table.evaluate([1.0, 1.0, 0.0])
    assert found.cost == (3.5 + 5.5) / 2
    assert found.exits == [0, 1, 1]
    assert found.accuracy == 1.0
    assert solve_thresholds(table, 4.5)[-1] == 0.0


def test_confidences_are_compared_in_float32_and_strictly() -> None:
    value = torch.tensor(0.9, dtype=torch.float32)
    table = ConfidenceTable(value.view(1, 1), torch.tensor([[True]]), (1.0,))
    assert table.exits([0.9]).tolist() == [-1]
    assert table.exits([0.8999999]).tolist() == [0]
    assert table.evaluate([0.9]).forced == 1


def test_temperatures_mend_confidences_and_leave_predictions() -> None:
    table = drawn_table(2000, 4)
    hot = ConfidenceTable.from_logits(
        torch.cat((table.logits[:, :1], table.logits.diff(dim=1)), 1) * 3, table.labels, table.costs
    )
    temperatures = fit_temperatures(hot)
    plain = fit_temperatures(table)
    assert torch.allclose(torch.tensor(temperatures), 3 * torch.tensor(plain), rtol=1e-3)
    mended = calibrate(hot, temperatures)
    assert torch.equal(mended.predicted, hot.predicted)
    for before, after in zip(calibration_error(hot), calibration_error(mended), strict=True):
        assert after < 0.5 * before
    # The likelihood has its peak there.
    nll = torch.nn.functional.cross_entropy
    best = nll(hot.logits[:, 2].double() / temperatures[2], hot.labels)
    for factor in (0.97, 1.03):
        assert nll(hot.logits[:, 2].double() / (temperatures[2] * factor), hot.labels) > best
    with pytest.raises(ConfigError, match="4 numbers above 0"):
        calibrate(hot, [1.0, 0.0, 1.0, 1.0])
    with pytest.raises(DataError, match="keep_logits"):
        fit_temperatures(dataclasses.replace(hot, logits=None))


def test_tables_survive_both_formats(tmp_path: Path) -> None:
    table = drawn_table(50)
    table.setup = "resnet18_95_[0.3]"
    path = tmp_path / "made" / "table.safetensors"
    table.save(path)
    again = ConfidenceTable.load(path)
    for name in ("confidence", "correct", "predicted", "labels", "logits"):
        assert torch.equal(getattr(again, name), getattr(table, name))
    assert (again.costs, again.setup, again.views) == (table.costs, table.setup, None)
    official = tmp_path / "table.pth"
    torch.save(table.to_official(), official)
    loaded = torch.load(official, weights_only=True)
    assert list(loaded) == ["setup", "thresholds", "predictions"]
    assert (loaded["thresholds"].dtype, loaded["predictions"].dtype) == (torch.float32, torch.bool)
    again = ConfidenceTable.load(official, table.costs)
    assert again.evaluate([0.5, 0.6, 0.0]) == table.evaluate([0.5, 0.6, 0.0])
    assert json.dumps(again.setup) == '"resnet18_95_[0.3]"'


def test_bad_tables_and_thresholds_are_refused_with_a_reason(tmp_path: Path) -> None:
    table = drawn_table(20)
    with pytest.raises(ConfigError, match="4 values for 3 stages"):
        table.evaluate([0.5, 0.5, 0.5, 0.0])
    with pytest.raises(ConfigError, match="0 values"):
        table.evaluate([])
    with pytest.raises(ConfigError, match=r"1.2 lies outside \[0, 1\]"):
        table.evaluate([1.2, 0.0])
    with pytest.raises(ConfigError, match="nan lies outside"):
        table.evaluate([float("nan"), 0.0])
    wrong = table.confidence.clone()
    for value, text in ((float("nan"), "is nan"), (1.5, "is 1.5"), (-0.1, "is -0.1")):
        wrong[3, 1] = value
        with pytest.raises(DataError, match=f"image 3 at stage 1 {text}"):
            dataclasses.replace(table, confidence=wrong)
    with pytest.raises(DataError, match="different tables"):
        dataclasses.replace(table, correct=table.correct[:, :2])
    with pytest.raises(DataError, match="2 costs for 3 stages"):
        dataclasses.replace(table, costs=(1.0, 2.0))
    with pytest.raises(DataError, match="label of image 0 is 6"):
        ConfidenceTable.from_logits(torch.zeros(2, 1, 6), torch.tensor([6, 0]), (1.0,))
    with pytest.raises(MissingFileError, match="table.py config"):
        ConfidenceTable.load(tmp_path / "gone.safetensors")
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(DataError, match="is no confidence table"):
        ConfidenceTable.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ConfidenceTable.load(path)
    official = tmp_path / "table.pth"
    torch.save({"setup": "x", "thresholds": torch.zeros(2, 2)}, official)
    with pytest.raises(DataError, match="no table of the authors"):
        ConfidenceTable.load(official)
    torch.save(table.to_official(), official)
    with pytest.raises(DataError, match="one cost per stage"):
        ConfidenceTable.load(official)
    with pytest.raises(DataError, match="two halves"):
        drawn_table(1).halves(0)
