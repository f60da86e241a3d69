"""PatchDrop through the engine: stages, resuming, the controller, the sweep and the picture."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.registry import init_default_scope
from patchdrop_helpers import labelled, patchdrop
from PIL import Image

from patchreg.methods.patchdrop.picture import draw_policy
from patchreg.registry import HOOKS
from patchreg.runner import run as engine
from patchreg.runner.build import latest_checkpoint, load_config
from patchreg.utils.errors import ConfigError, MissingFileError
from patchreg.utils.weights import load_file

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
_base_ = ["{root}/configs/patchdrop/quick_{name}.py"]
train_dataloader = dict(batch_size=16, dataset=dict(subset=64))
val_dataloader = dict(batch_size=16, dataset=dict(subset=48))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=2, val_interval=1)
optim_wrapper = dict(_delete_=True, type="OptimWrapper", optimizer=dict(type="Adam", lr=1e-3))
param_scheduler = None
model = dict({model})
"""
THIN = "backbone=dict(depth=8)"
HR = 'init_cfg=dict(checkpoint="work_dirs/toy/classifier/last.pth")'


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The quick stages, on a few images of whatever set is there."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs" / "toy"
    folder.mkdir(parents=True)
    part = f"classifier=dict({THIN}, {HR})"
    policy = 'selector=dict(init_cfg=dict(checkpoint="work_dirs/toy/pretrain/last.pth"))'
    models = {"classifier": THIN, "pretrain": part, "finetune": f"{part}, {policy}"}
    for name, model in models.items():
        text = SMALL.format(root=ROOT, name=name, model=model)
        (folder / f"{name}.py").write_text(text)
    (folder / "sweep.py").write_text(
        f'_base_ = ["{ROOT}/configs/patchdrop/quick_sweep.py"]\n'
        'load_from = "work_dirs/toy/finetune/last.pth"\n'
        f"model = dict(classifier=dict({THIN}))\n"
        "val_dataloader = dict(batch_size=16, dataset=dict(subset=48))\n"
        "test_dataloader = val_dataloader\n"
        'test_cfg = dict(thresholds=(0.5,), top_k=(4,), baselines=("random",))\n'
    )
    leaves = ["classifier.py", "pretrain.py", "finetune.py", "sweep.py"]
    (folder / "all.py").write_text(f"stages = {leaves}\n")
    return folder


def test_all_stages_in_a_row(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine.train(str(project / "all.py"), work_dir="runs")
    record = json.loads(Path("runs/stages.json").read_text())
    assert len(record) == 4
    told = capsys.readouterr().out.split("all stages are finished")[1]
    for name in ("policy/accuracy", "policy/kept_patches_mean", "policy/unique_policies"):
        assert told.count(name) == 2
    hr = load_file(latest_checkpoint("runs/classifier"))["state_dict"]
    frozen = load_file(latest_checkpoint("runs/pretrain"))["state_dict"]
    for key, value in hr.items():
        assert torch.equal(frozen[f"classifier.{key}"], value)
    rows = list(csv.DictReader(Path("runs/sweep/patches.csv").read_text().splitlines()))
    assert [row["policy"] for row in rows] == ["policy", "random", "policy", "random"]
    assert float(rows[2]["kept"]) == float(rows[3]["kept"]) == 4
    assert abs(float(rows[0]["kept"]) - float(rows[1]["kept"])) < 0.4
    assert Path("runs/sweep/patches.png").stat().st_size > 5000
    log = next(Path("runs/finetune").glob("*/*.log")).read_text()
    assert "| Acc: " in log
    draw_policy("test", str(project / "finetune.py"), "runs/finetune", "policy.png", 3)
    assert Path("policy.png").stat().st_size > 5000
    Image.effect_noise((50, 40), 30).save("photo.png")
    draw_policy("photo.png", str(project / "finetune.py"), "runs/finetune", "one.png")
    assert Path("one.png").stat().st_size > 3000
    with pytest.raises(ConfigError, match="has no policy"):
        draw_policy("test", str(project / "classifier.py"), "runs/classifier", "policy.png")


def test_stages_alone_name_what_they_need(project: Path) -> None:
    with pytest.raises(MissingFileError, match="classifier/last.pth"):
        engine.train(str(project / "pretrain.py"))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_resumed_stage_ends_as_an_uninterrupted_one(project: Path, stage: str) -> None:
    for earlier in ("classifier", "pretrain", "finetune"):
        engine.train(str(project / f"{earlier}.py"))
        if earlier == stage:
            break
    folder = Path("work_dirs/toy") / stage
    whole = load_file(latest_checkpoint(folder))["state_dict"]
    assert whole["policy_loss.surcharge"] != 0
    engine.train(str(project / f"{stage}.py"), work_dir="again", resume=str(folder / "epoch_1.pth"))
    again = load_file(latest_checkpoint("again"))["state_dict"]
    assert whole.keys() == again.keys()
    for key, value in whole.items():
        assert torch.equal(again[key], value), key


class Hub:
    """Stand-in for the message hub."""

    def update_scalar(self, name: str, value: float) -> None:
        self.last = name, value


def test_controller_meets_its_target() -> None:
    """Adam on a policy that would like to keep everything, or nothing."""
    init_default_scope("patchreg")
    for target in (4.0, 12.0):
        torch.manual_seed(0)
        model = patchdrop("pretrain").train()
        hook = HOOKS.build(dict(type="PatchDropBudgetHook", target=target))
        runner = SimpleNamespace(model=model, message_hub=Hub())
        hook.before_train(runner)
        optimiser = torch.optim.Adam(model.selector.parameters(), lr=3e-3)
        images, targets = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
        kept = []
        for _ in range(120):
            optimiser.zero_grad()
            model.loss(images, labelled(targets))["loss_policy"].backward()
            optimiser.step()
            hook.after_train_iter(runner, 0)
            kept.append(model.decide(model.last_step.overview).sum(1).float().mean().item())
            assert model.selector.training
        mean = sum(kept[-50:]) / 50
        assert abs(mean - target) <= 0.5, mean
        assert runner.message_hub.last[0] == "train/patch_price"


def test_controller_moves_by_the_distance_from_its_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    init_default_scope("patchreg")
    model = patchdrop()
    config = dict(type="PatchDropBudgetHook", target=6, proportional=3.0, integral=0.1)
    hook = HOOKS.build(config)
    runner = SimpleNamespace(model=model, message_hub=Hub())
    for kept, price in (([4, 10], 3.1), ([8, 8], 6.3), ([6, 6], 0.3), ([4, 4], -5.9)):
        actions = (torch.arange(16) < torch.tensor(kept)[:, None]).float()
        model.last_step = SimpleNamespace(overview=None)
        monkeypatch.setattr(model, "decide", lambda overview, actions=actions: actions.bool())
        hook.after_train_iter(runner, 0)
        assert model.policy_loss.surcharge.item() == pytest.approx(price / 16)
    with pytest.raises(ConfigError, match="the grid has 16 patches"):
        HOOKS.build(dict(type="PatchDropBudgetHook", target=16)).before_train(runner)


@pytest.mark.parametrize("values", [dict(target=0), dict(target=4, integral=-1)])
def test_controllers_that_cannot_work(values: dict[str, Any]) -> None:
    init_default_scope("patchreg")
    with pytest.raises(ConfigError, match="target and integral > 0"):
        HOOKS.build(dict(type="PatchDropBudgetHook", **values))


def test_sweeps_that_cannot_work(project: Path) -> None:
    for name in ("classifier", "pretrain", "finetune"):
        engine.train(str(project / f"{name}.py"))
    options = {"test_cfg.thresholds": (), "test_cfg.top_k": ()}
    with pytest.raises(ConfigError, match="set thresholds or top_k"):
        engine.evaluate(str(project / "sweep.py"), options=options)
    options = {"test_cfg.top_k": (-1, 20)}
    with pytest.raises(ConfigError, match=r"top_k=\[-1, 20\]: expected 0 to 16"):
        engine.evaluate(str(project / "sweep.py"), options=options)
    assert load_config(str(project / "sweep.py")).test_cfg.type == "PatchDropSweepLoop"
