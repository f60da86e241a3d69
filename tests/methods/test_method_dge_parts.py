"""DGE's losses, schedule, average, metrics, configs, and a short training."""

from __future__ import annotations

import math
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from dge_helpers import classifier, samples, spread_routers, total
from mmengine.config import Config
from torch import nn

from patchreg.hooks.ema import ModelEMA
from patchreg.losses import CrossEntropyLoss
from patchreg.methods.dge.loss import DGEBudgetLoss, DGEDistillationLoss
from patchreg.methods.dge.metric import DGEGranularityMetric
from patchreg.methods.dge.schedule import DeiTCosineLR
from patchreg.metrics import CostMetric
from patchreg.registry import MODELS
from patchreg.runner.strict import check_config
from patchreg.utils.errors import CheckpointError, ConfigError, DataError, MissingFileError

PARAMETERS = {
    "deit_tiny": 5_735_884,
    "deit_small": 22_087_564,
    "deit_base": 86_641_420,
    "dense_deit_tiny": 5_728_936,
    "dense_deit_small": 22_073_704,
    "dense_deit_base": 86_613_736,
}


# ---- losses ----


def test_budget_loss_by_hand():
    dynamic = torch.tensor([30.0, 50.0], dtype=torch.float64, requires_grad=True)
    loss = DGEBudgetLoss(0.5, loss_weight=3.0)(dynamic, 100.0)
    loss.backward()
    assert loss.item() == pytest.approx(3 * 0.1**2)
    assert dynamic.grad.tolist() == pytest.approx([3 * 2 * -0.1 / 200] * 2)
    # The static cost counts as at least 1, so that an empty model does not divide by zero.
    assert DGEBudgetLoss(0.5)(torch.zeros(2, dtype=torch.float64), 0.0).item() == 0.25


def _global_budget(rank: int, port: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    weight = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    dynamic = weight * torch.tensor([[20.0, 30.0], [70.0, 90.0]], dtype=torch.float64)[rank]
    found = {}
    for scope in ("process", "global"):
        weight.grad = None
        loss = DGEBudgetLoss(0.5, scope=scope)(dynamic, 100.0)
        loss.backward(retain_graph=True)
        torch.distributed.all_reduce(weight.grad)
        found[scope] = (loss.detach(), weight.grad / 2)
    torch.save(found, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.ddp
def test_global_budget_is_that_of_the_whole_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_global_budget, args=(port, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    weight = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    costs = torch.tensor([20.0, 30.0, 70.0, 90.0], dtype=torch.float64)
    whole = DGEBudgetLoss(0.5)(weight * costs, 100.0)
    whole.backward()
    for loss, gradient in (item["global"] for item in found):
        assert loss.item() == pytest.approx(whole.item(), rel=1e-14)
        assert gradient.item() == pytest.approx(weight.grad.item(), rel=1e-14)
    assert found[0]["process"][0].item() != pytest.approx(found[1]["process"][0].item(), rel=0.1)
    assert found[0]["process"][1].item() != pytest.approx(weight.grad.item(), rel=0.01)


def test_distillation_options():
    student, teacher = torch.randn(4, 7), torch.randn(4, 7)
    base = torch.tensor(2.0)
    per_element = DGEDistillationLoss("soft")(base, student, teacher)["loss_distill"]
    per_image = DGEDistillationLoss("soft", divide_by_classes=False)(base, student, teacher)
    assert per_image["loss_distill"].item() == pytest.approx(7 * per_element.item(), rel=1e-6)
    assert DGEDistillationLoss("none")(base, student, teacher) == {"loss_cls": base}
    with pytest.raises(ConfigError, match=r"\(4, 7\), the teacher's \(4, 5\)"):
        DGEDistillationLoss("hard")(base, student, torch.randn(4, 5))
    with pytest.raises(ConfigError, match="mode='kl' is unknown"):
        DGEDistillationLoss("kl")
    with pytest.raises(ConfigError, match=r"alpha=2.0, tau=1.0: expected alpha in \[0, 1\]"):
        DGEDistillationLoss("soft", alpha=2.0)


def test_class_loss_weighs_and_lifts_half_precision():
    logits = (torch.randn(4, 7) * 20).to(torch.bfloat16)
    labels = torch.tensor([0, 1, 2, 3])
    exact = CrossEntropyLoss()(logits.float(), labels)
    found = CrossEntropyLoss(loss_weight=2.0)(logits, labels)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(2 * exact.item(), rel=1e-6)
    # Soft targets are used as they are, whatever label_smooth says.
    soft = torch.nn.functional.one_hot(labels, 7).float()
    assert CrossEntropyLoss(0.1)(logits, soft).item() == pytest.approx(exact.item(), rel=1e-6)
    with pytest.raises(ConfigError, match=r"label_smooth=1.0 is outside \[0, 1\)"):
        CrossEntropyLoss(1.0)


# ---- schedule ----


def scheduler(**kwargs) -> DeiTCosineLR:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    return DeiTCosineLR(optimizer, **kwargs)


def test_textbook_schedule_has_no_lag():
    plain = scheduler(T_max=10, warmup_epochs=2, lag=0)
    late = scheduler(T_max=10, warmup_epochs=2)
    rates = [plain.rate(1e-3, epoch) for epoch in range(10)]
    assert rates[0] == 1e-6
    assert rates[1] == pytest.approx(1e-6 + (1e-3 - 1e-6) / 2)
    assert [late.rate(1e-3, epoch) for epoch in range(10)] == [rates[0], *rates[:9]]
    assert scheduler(T_max=10, warmup_epochs=0).rate(1e-3, 0) == 1e-3


def test_noise_multiplies_the_rate_within_its_range():
    noisy = scheduler(T_max=100, warmup_epochs=0, noise_range=(0.2, 0.5), seed=3)
    plain = scheduler(T_max=100, warmup_epochs=0)
    for epoch in (0, 1, 20, 21, 30, 50, 51, 80):
        t = max(epoch - 1, 0)
        expected = plain.rate(1e-3, epoch)
        if 20 <= t < 50:
            generator = torch.Generator().manual_seed(3 + t)
            noise = math.inf
            while abs(noise) >= 0.67:
                noise = torch.randn(1, generator=generator).item()
            expected *= 1 + noise
        assert noisy.rate(1e-3, epoch) == pytest.approx(expected, rel=1e-12), epoch
    open_end = scheduler(T_max=100, warmup_epochs=0, noise_range=(0.2,), seed=3)
    assert open_end.rate(1e-3, 80) != plain.rate(1e-3, 80)


def test_schedule_resumes_from_its_state():
    first = scheduler(T_max=20, warmup_epochs=3)
    for _ in range(7):
        first.optimizer.step()
        first.step()
    second = scheduler(T_max=20, warmup_epochs=3)
    second.load_state_dict(first.state_dict())
    second.step()
    first.step()
    assert second.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(T_max=0), "T_max=0"),
        (dict(T_max=5, linear_warmup=True), "set convert_to_iter_based=True"),
        (dict(T_max=5, by_epoch=False), "by_epoch=False needs epoch_length"),
    ],
)
def test_bad_schedules(options, message):
    with pytest.raises(ConfigError, match=message):
        scheduler(**options)


# ---- average ----


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))
        self.register_buffer("mean", torch.tensor([10.0]))
        self.register_buffer("splits", torch.tensor([3, 1]))


def test_average_starts_at_the_first_state_and_copies_integers():
    model = Holder()
    average = ModelEMA(model, momentum=0.25)
    with torch.no_grad():
        model.weight.fill_(5.0)
        model.mean.fill_(20.0)
        model.splits.copy_(torch.tensor([3, 2]))
    average.update_parameters(model)
    assert average.module.weight.item() == 0.75 * 1 + 0.25 * 5
    assert average.module.mean.item() == 0.75 * 10 + 0.25 * 20
    assert average.module.splits.tolist() == [3, 2]
    # Saved and loaded, it goes on as if nothing had happened.
    again = ModelEMA(Holder(), momentum=0.25)
    again.load_state_dict(average.state_dict())
    for item in (average, again):
        item.update_parameters(model)
    assert again.module.weight.item() == average.module.weight.item() == 0.75 * 2 + 0.25 * 5
    with pytest.raises(ConfigError, match=r"momentum=1.0 is outside \(0, 1\)"):
        ModelEMA(model, momentum=1.0)


def test_average_hook_is_built_by_mmengine():
    from mmengine.registry import DefaultScope

    from patchreg.registry import HOOKS

    DefaultScope.get_instance("average", scope_name="patchreg")
    hook = HOOKS.build(dict(type="ModelEMAHook", momentum=0.5))

    class Runner:
        model = Holder()
        iter = 0

    hook.before_run(Runner)
    with torch.no_grad():
        Runner.model.weight.fill_(3.0)
    hook.after_train_iter(Runner, 0)
    assert hook.ema_model.module.weight.item() == 2.0
    hook.before_val_epoch(Runner)
    assert Runner.model.weight.item() == 2.0
    hook.after_val_epoch(Runner)
    assert Runner.model.weight.item() == 3.0


# ---- metrics ----


def test_cost_metric_weighs_images_and_drops_padding():
    metric = CostMetric(unit=10.0)
    batches = [[10.0, 20.0, 30.0], [100.0, 40.0]]
    for batch in batches:
        metric.process(None, [dict(macs=macs, dense_macs=200.0) for macs in batch])
    # Five results of four images: the last one only filled up the batch.
    assert metric.evaluate(4) == {
        "cost/macs": 4.0,
        "cost/macs_min": 1.0,
        "cost/macs_max": 10.0,
        "cost/dense_macs": 20.0,
        "cost/ratio": 0.2,
    }
    with pytest.raises(DataError, match="tell no cost"):
        metric.process(None, [dict(pred_label=0)])


def test_granularity_metric_counts_regions_block_by_block():
    metric = DGEGranularityMetric(splits=(2, 1))
    for shares in ([[1.0, 0.0], [0.5, 0.5]], [[0.5, 0.5], [0.0, 1.0]]):
        metric.process(None, [dict(granularity=torch.tensor(shares))])
    assert metric.evaluate(2) == {
        "granularity/s2": 0.5,
        "granularity/s1": 0.5,
        "granularity/block0_s2": 0.75,
        "granularity/block0_s1": 0.25,
        "granularity/block1_s2": 0.25,
        "granularity/block1_s1": 0.75,
    }
    with pytest.raises(DataError, match=r"counts splits \[2, 1\] but the predictions tell none"):
        metric.process(None, [dict(pred_label=0)])
    with pytest.raises(DataError, match="tell 3 candidates"):
        metric.process(None, [dict(granularity=torch.zeros(4, 3))])


# ---- timm ----


def test_timm_model_with_local_weights(tmp_path):
    source = MODELS.build(dict(type="TimmBackbone", model_name="test_resnet", num_classes=4))
    torch.save(dict(model=source.model.state_dict(), epoch=3), tmp_path / "weights.pth")
    cfg = dict(
        type="TimmBackbone",
        model_name="test_resnet",
        num_classes=4,
        checkpoint=str(tmp_path / "weights.pth"),
        frozen=True,
    )
    model = MODELS.build(cfg).train()
    images = torch.randn(2, 3, 64, 64)
    found = model(images)
    assert torch.equal(found, source.eval()(images))
    assert not found.requires_grad
    assert not model.model.training
    with pytest.raises(CheckpointError, match="does not fit 'test_resnet'"):
        MODELS.build(cfg | dict(num_classes=5))
    with pytest.raises(MissingFileError, match=r"nowhere\.pth"):
        MODELS.build(cfg | dict(checkpoint="nowhere.pth"))
    with pytest.raises(ConfigError, match="has no model 'resnet_of_nobody'"):
        MODELS.build(dict(type="TimmBackbone", model_name="resnet_of_nobody"))


# ---- configs ----


@pytest.mark.parametrize("name", [*PARAMETERS, "quick", "dense_quick"])
def test_config_is_sound_and_builds_the_published_model(name, project_root):
    config = Config.fromfile(str(project_root / f"configs/dge/{name}.py"))
    check_config(config)
    model = MODELS.build(config.model)
    parameters = sum(value.numel() for value in model.parameters())
    assert parameters == PARAMETERS.get(name, parameters)
    dense = name.startswith("dense")
    size = config.model.backbone.img_size
    assert size == (32 if "quick" in name else 256)
    if "quick" not in name:
        schedule, warmup = config.param_scheduler, 5 if dense else 20
        assert (schedule.T_max, schedule.warmup_epochs) == (300, warmup)
        assert config.train_dataloader.batch_size * 8 == 1024
        lr = config.optim_wrapper.optimizer.lr * 1024 / config.auto_scale_lr.base_batch_size
        assert lr == 1e-3
        assert config.auto_scale_lr.enable
        assert config.custom_hooks[-1] == dict(type="ModelEMAHook", momentum=4e-5)
    if not dense:
        assert config.model.budget_loss.budget == 0.5


# ---- training ----


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "low", "high"), [(0.5, 0.45, 0.58), (1.0, 0.95, 1.0)])
def test_short_training_meets_its_budget(budget, low, high):
    torch.manual_seed(0)
    model = classifier(
        dims=32,
        depth=3,
        heads=2,
        img_size=32,
        patch_size=4,
        model_budget_loss=dict(type="DGEBudgetLoss", budget=budget),
    ).train()
    patterns = torch.randn(10, 3, 32, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ratios = []
    for _ in range(320):
        labels = torch.randint(10, (32,))
        images = patterns[labels] + torch.randn(32, 3, 32, 32)
        losses = model.loss(images, samples(labels))
        optimizer.zero_grad()
        total(losses).backward()
        optimizer.step()
        ratios.append(float(losses["dge_ratio"]))
    assert low <= sum(ratios[-50:]) / 50 <= high
    assert losses["loss_cls"].item() < 0.5


def test_two_steps_of_training_lower_the_loss_the_same_way_twice():
    curves = []
    for _ in range(2):
        torch.manual_seed(0)
        model = spread_routers(classifier(drop_path_rate=0.1)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        images, targets = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
        curve = []
        for _ in range(5):
            loss = total(model.loss(images, samples(targets)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == curves[1]
    assert curves[0][-1] < curves[0][0] - 0.1
