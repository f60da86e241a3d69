"""One checkpoint at any budget: calibration, its limits and messages, the hook and the sweep."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dge_helpers import classifier, force_choice, samples, spread_routers
from torch import nn

from patchreg.methods.dge.budget import calibrate_budget
from patchreg.methods.dge.hook import DGEBudgetHook
from patchreg.pictures.granularity import draw_granularity
from patchreg.registry import MODELS
from patchreg.runner import run as engine
from patchreg.runner.compare import Entry, compare
from patchreg.utils.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parent.parent.parent
QUICK = str(ROOT / "configs/dge/quick.py")
SMALL = {
    "model.backbone.arch": dict(embed_dims=16, depth=2, num_heads=2),
    "model.head.in_channels": 16,
    "train_dataloader.dataset.data_root": "nowhere",
    "val_dataloader.dataset.data_root": "nowhere",
    "test_dataloader.dataset.data_root": "nowhere",
}


def lively(**kwargs) -> nn.Module:
    """A float64 classifier in evaluation mode that uses every granularity."""
    return spread_routers(classifier(**kwargs)).double().eval()


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (48, 3, 64, 64)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


@torch.no_grad()
def executed_share(model: nn.Module, batches: list[torch.Tensor]) -> float:
    """Mean share that the predictions themselves report."""
    found = [
        sample.macs / sample.dense_macs
        for batch in batches
        for sample in model(batch, samples(torch.zeros(len(batch), dtype=torch.int64)), "predict")
    ]
    return sum(found) / len(found)


@pytest.mark.parametrize("splits", [(4, 2, 1), (1, 2, 4), (2, 1)], ids=str)
def test_five_budgets_are_met_and_cost_rises_with_them(splits, batches) -> None:
    model = lively(splits=splits)
    lowest = calibrate_budget(model, batches, 1.0)["lowest"]
    model.shift_routers(-math.inf)
    assert executed_share(model, batches) == pytest.approx(lowest, rel=1e-12)
    targets = [lowest + part * (1 - lowest) for part in (0.15, 0.35, 0.6, 0.85)] + [1.0]
    shifts = []
    for target in targets:
        found = calibrate_budget(model, batches, target)
        share = executed_share(model, batches)
        assert share == pytest.approx(found["share"], rel=1e-12)
        assert share == pytest.approx(target, rel=0.02)
        assert found["passes"] <= 12
        shifts.append(found["shift"])
    assert shifts == sorted(shifts)
    assert shifts[-1] == math.inf


def test_calibrated_choices_are_the_same_on_both_paths(batches) -> None:
    model = lively()
    calibrate_budget(model, batches, 0.7)
    with torch.no_grad():
        sparse = model(batches[0])
        model.backbone.eval_path = "dense"
        assert (model(batches[0]) - sparse).abs().max() < 1e-10
    # The share is what the sparse path executes, whatever path it was calibrated on.
    assert calibrate_budget(model, batches, 0.7)["share"] == pytest.approx(0.7, rel=0.02)


def test_pyramids_meet_a_budget(batches) -> None:
    arch = dict(embed_dims=[8, 16], depths=[1, 2], num_heads=[1, 2])
    arch.update(mlp_ratios=[2, 2], sr_ratios=[2, 1])
    model = spread_routers(
        MODELS.build(
            dict(
                type="DGEClassifier",
                backbone=dict(
                    type="DGEPyramidVisionTransformerBackbone",
                    arch=arch,
                    img_size=64,
                    splits=[2, 1],
                ),
                head=dict(type="LinearHead", num_classes=5, in_channels=16),
            )
        )
    )
    found = calibrate_budget(model.double().eval(), batches, 0.8)
    assert executed_share(model, batches) == pytest.approx(0.8, rel=0.02)
    assert found["lowest"] < 0.7


@pytest.mark.parametrize("splits", [(4, 2, 1), (1, 4)], ids=str)
def test_full_budget_gives_the_logits_of_the_all_fine_model(splits, batches) -> None:
    model = lively(splits=splits)
    fine = copy.deepcopy(model)
    force_choice(fine, splits.index(4))
    with torch.no_grad():
        assert not torch.equal(model(batches[0]), fine(batches[0]))
        found = calibrate_budget(model, batches, 1.0)
        assert torch.equal(model(batches[0]), fine(batches[0]))
    assert (found["share"], found["highest"]) == (1.0, 1.0)


def test_a_budget_is_no_part_of_training_or_of_a_checkpoint(batches) -> None:
    model = lively(drop_path_rate=0.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    noise = [torch.zeros(2, 2, 2, 3, dtype=torch.float64)] * 3
    targets = samples(torch.tensor([1, 2]))
    losses = [model.train().loss(batches[0][:2], targets, noise=noise)]
    found = calibrate_budget(model, batches, 0.5)
    assert model.training
    assert found["shift"] != 0
    losses.append(model.loss(batches[0][:2], targets, noise=noise))
    assert {key: value.item() for key, value in losses[0].items()} == {
        key: value.item() for key, value in losses[1].items()
    }
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert sum(1 for _ in model.buffers()) == sum(1 for _ in lively().buffers())
    # It moves along with the weights, in its own type.
    shift = model.backbone.blocks[0].dge.router.offset
    assert model.half().backbone.blocks[0].dge.router.offset.dtype == shift.dtype
    assert model.to("meta").backbone.blocks[0].dge.router.offset.device.type == "meta"
    model = lively(drop_path_rate=0.0)
    calibrate_budget(model, batches, 0.5)
    model.eval().shift_routers(None)
    with torch.no_grad():
        assert torch.equal(model(batches[0]), lively(drop_path_rate=0.0)(batches[0]))


def test_targets_that_cannot_be_met_are_refused(batches) -> None:
    model = lively()
    for target in (0.01, 1.2):
        with pytest.raises(ConfigError, match=rf"budget={target}: .* 0\.\d{{4}} .* to 1\.0000"):
            calibrate_budget(model, batches, target)
    assert model.backbone.blocks[0].dge.router.offset is None
    with pytest.raises(DataError, match="at least one batch"):
        calibrate_budget(model, [], 0.5)
    # Routers that score all regions alike move all of them at once.
    force_choice(model, 0)
    with pytest.raises(ConfigError, match=r"cannot be met within 2\.0%: .* jumps from 0\."):
        calibrate_budget(model, batches, 0.6)


def test_model_with_a_budget_asks_for_a_calibration(batches) -> None:
    model = lively(model_budget=0.6)
    with pytest.raises(ConfigError, match=r"budget=0\.6 is not calibrated.*DGEBudgetHook"):
        model(batches[0])
    calibrate_budget(model, batches, model.budget)
    assert executed_share(model, batches) == pytest.approx(0.6, rel=0.02)
    with pytest.raises(ConfigError, match=r"budget=1\.5: expected a share in \(0, 1\]"):
        classifier(model_budget=1.5)
    plain = dict(type="VisionTransformerBackbone", drop_path_rate=0.0)
    with pytest.raises(ConfigError, match="needs a backbone with routers"):
        MODELS.build(
            dict(
                type="DGEClassifier",
                budget=0.5,
                backbone=dict(plain, arch=dict(embed_dims=8, depth=1, num_heads=1), img_size=32),
                head=dict(type="LinearHead", num_classes=2, in_channels=8),
            )
        )


def test_hook_leaves_models_without_a_budget_alone() -> None:
    DGEBudgetHook().before_test_epoch(SimpleNamespace(model=lively()))
    DGEBudgetHook().before_val_epoch(SimpleNamespace(model=nn.Linear(2, 2)))


def log_of(work_dir: Path) -> str:
    """What a run has logged."""
    return "".join(path.read_text() for path in work_dir.rglob("*.log"))


def test_evaluation_calibrates_on_training_images(tmp_path: Path) -> None:
    found = engine.evaluate(QUICK, work_dir=str(tmp_path), options={**SMALL, "model.budget": 0.7})
    assert found["cost/ratio"] == pytest.approx(0.7, rel=0.05)
    assert "calibrated on 512 images of the training set" in log_of(tmp_path)


def test_evaluation_without_training_data_calibrates_on_its_own(tmp_path: Path) -> None:
    config = tmp_path / "only_test.py"
    config.write_text(
        f'_base_ = ["{QUICK}"]\n'
        "model = dict(budget=0.7, backbone=dict(arch=dict(embed_dims=16, depth=2, num_heads=2)), "
        "head=dict(in_channels=16))\n"
        'test_dataloader = dict(dataset=dict(data_root="nowhere"))\n'
        "train_dataloader = train_cfg = optim_wrapper = param_scheduler = None\n"
        "val_dataloader = val_cfg = val_evaluator = None\n"
    )
    work_dir = tmp_path / "run"
    found = engine.evaluate(str(config), work_dir=str(work_dir))
    assert found["cost/ratio"] == pytest.approx(0.7, rel=0.02)
    assert "calibrated on 500 images of the evaluated set" in log_of(work_dir)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """Random weights of the small model whose routers use every granularity."""
    config = engine.load_config(QUICK, SMALL)
    model = spread_routers(MODELS.build({**config.model, "data_preprocessor": None}))
    path = tmp_path / "random.pth"
    torch.save(dict(state_dict=model.state_dict()), path)
    return str(path)


def test_comparison_calibrates(checkpoint: str) -> None:
    options = {**SMALL, "test_dataloader.dataset.subset": 300}
    rows = compare(
        [
            Entry("as trained", QUICK, checkpoint, options),
            Entry("0.7", QUICK, checkpoint, {**options, "model.budget": 0.7}),
        ],
        rounds=1,
        batch_size=8,
    ).rows
    assert abs(rows[0].mac_ratio - 0.7) > 0.03
    assert rows[1].mac_ratio == pytest.approx(0.7, rel=0.05)


def test_picture_calibrates(checkpoint: str, tmp_path: Path) -> None:
    config = tmp_path / "budget.py"
    config.write_text(
        f'_base_ = ["{QUICK}"]\n'
        "model = dict(budget=0.7, backbone=dict(arch=dict(embed_dims=16, depth=2, num_heads=2)), "
        "head=dict(in_channels=16))\n"
        'train_dataloader = dict(dataset=dict(data_root="nowhere"))\n'
        'val_dataloader = dict(dataset=dict(data_root="nowhere"))\n'
        'test_dataloader = dict(dataset=dict(data_root="nowhere"))\n'
    )
    picture = tmp_path / "granularity.png"
    draw_granularity("test", str(config), checkpoint, str(picture), count=2)
    assert picture.stat().st_size > 2000


def test_validation_calibrates_too(tmp_path: Path) -> None:
    brief = {
        "model.budget": 0.7,
        "train_dataloader.dataset.subset": 256,
        "train_cfg.max_epochs": 1,
        "param_scheduler.total_steps": 1,
        "param_scheduler.end": 1,
    }
    engine.train(QUICK, work_dir=str(tmp_path), options={**SMALL, **brief})
    assert "calibrated on 256 images of the training set" in log_of(tmp_path)


def test_sweep_writes_table_and_picture(tmp_path: Path) -> None:
    sweep = {"test_cfg.type": "DGEBudgetSweepLoop", "test_cfg.budgets": [1.0, 0.6, 0.8]}
    found = engine.evaluate(QUICK, work_dir=str(tmp_path), options={**SMALL, **sweep})
    with (tmp_path / "budgets.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "budget",
        "calibration_share",
        "share",
        "macs",
        "top1",
        "images_per_second",
        "shift",
    ]
    assert [float(row["budget"]) for row in rows] == [0.6, 0.8, 1.0]
    shares = [float(row["calibration_share"]) for row in rows]
    assert shares == pytest.approx([0.6, 0.8, 1.0], rel=0.02)
    assert shares[-1] == 1.0
    for row in rows:
        budget = f"{float(row['budget']):g}"
        assert float(row["top1"]) == found[f"{budget}/accuracy/top1"]
        assert float(row["share"]) == found[f"{budget}/cost/ratio"]
        assert float(row["macs"]) == pytest.approx(found[f"{budget}/cost/macs"] * 1e9)
        assert float(row["images_per_second"]) > 0
    assert (tmp_path / "budgets.png").stat().st_size > 5000
    assert "one checkpoint at several budgets" in log_of(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_cfg.budgets": []}, "expected at least one share"),
        ({"model.accounting": "upstream"}, "model.accounting='corrected'"),
        ({"test_evaluator.0.topk": [5]}, "add mmpretrain.Accuracy"),
        ({"test_cfg.budgets": [0.05]}, "coarsest everywhere"),
    ],
)
def test_sweep_says_what_it_lacks(tmp_path: Path, options: dict, message: str) -> None:
    sweep = {"test_cfg.type": "DGEBudgetSweepLoop", "test_dataloader.dataset.subset": 20}
    with pytest.raises(ConfigError, match=message):
        engine.evaluate(QUICK, work_dir=str(tmp_path), options={**SMALL, **sweep, **options})
