"""Parity of DeiT-DGE, plain DeiT, losses, schedules and cost accounting with the authors' code."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from dge_helpers import classifier, error, samples, total
from golden_reader import load
from mmengine.config import Config
from patchreg_ops import row_lengths, row_plan
from torch import nn

from patchreg.hooks.ema import ModelEMA
from patchreg.losses import CrossEntropyLoss
from patchreg.methods.dge.convert import from_official, to_official
from patchreg.methods.dge.cost import BlockRouting, Routing
from patchreg.methods.dge.loss import DGEBudgetLoss, DGEDistillationLoss
from patchreg.methods.dge.schedule import DeiTCosineLR
from patchreg.models.layers import drop_path
from patchreg.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)
SPLITS = (4, 2, 1)


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """Tolerance of outputs and of gradients."""
    return (1e-9, 1e-9) if dtype == torch.float64 else (1e-5, 1e-4)


@pytest.fixture(scope="module")
def golden():
    return load("dge", "model_deit_dge")


def golden_model(golden, dtype: torch.dtype, **kwargs) -> nn.Module:
    model = classifier(**kwargs).to(dtype)
    model.load_state_dict(from_official(golden.group("sd")))
    return model


@DTYPES
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_evaluation(golden, dtype, path):
    outputs, _ = limits(dtype)
    model = golden_model(golden, dtype, eval_path=path, model_accounting="upstream").eval()
    images = golden["images"].to(dtype)
    with torch.no_grad():
        features = model.extract(images)
        blocks = model.backbone(images, out_blocks=range(3)).blocks
        logits = model(images)
    assert error(logits, golden["eval/logits"]) < outputs
    for index, record in enumerate(features.routing.blocks):
        name = f"eval/block{index}"
        assert error(blocks[index], golden[f"{name}/tokens"]) < outputs
        assert error(record.logits, golden[f"{name}/router_logits"]) < outputs
        plan = row_plan(record.choice, SPLITS, 8, 8, 1)
        assert torch.equal(plan.rows, golden[f"{name}/patches"])
        assert torch.equal(plan.lengths, golden[f"{name}/batch_lengths"])
        assert torch.equal(record.queries, golden[f"{name}/batch_lengths"].double())
    dynamic = features.routing.dynamic("upstream")
    executed, static = model.cost(features)
    assert [static, float(dynamic.mean())] == golden["eval/complexity"].tolist()
    if path == "sparse":
        assert torch.equal(executed, dynamic)
    else:
        # All candidates are computed: 1 + 4 * (16 + 4 + 1) queries instead of 65 of the dense twin.
        per_query = sum(block.cost.per_query("upstream") for block in features.routing.blocks)
        assert torch.allclose(
            executed, torch.full_like(executed, static + 20 * per_query), rtol=1e-12
        )


@DTYPES
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_training(golden, dtype, path):
    outputs, gradients = limits(dtype)
    model = golden_model(golden, dtype, sparse_train=path == "sparse").train()
    images, targets = golden["images"].to(dtype), golden["targets"]
    noise = [golden[f"train/block{index}/gumbel"] for index in range(3)]
    features = model.extract(images, noise)
    for index, record in enumerate(features.routing.blocks):
        soft = (record.logits + noise[index].to(dtype)).softmax(-1)
        assert torch.equal(record.choice, golden[f"train/block{index}/choice"])
        assert error(soft, golden[f"train/block{index}/soft"]) < outputs
    assert error(model.head(features), golden[f"train_{path}/logits"]) < outputs

    losses = model.loss(images, samples(targets), noise=noise)
    names = ("loss_cls", "loss_dge", "dge_ratio", "comp_static", "comp_dynamic")
    found = torch.stack([losses[name].double() for name in names])
    expected = golden[f"train_{path}/losses"]
    assert torch.allclose(found, expected, rtol=outputs, atol=0)
    # The budget term is float64 whatever the model's type: its only error is the rounding of the
    # gate.
    assert losses["loss_dge"].dtype == torch.float64

    total(losses).backward()
    expected = from_official(golden.group(f"train_{path}/grad"))
    found = {name: value.grad for name, value in model.named_parameters()}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert error(found[name], gradient) < gradients, name


@DTYPES
def test_plain_deit(dtype):
    outputs, gradients = limits(dtype)
    golden = load("dge", "model_standard")
    backbone = dict(
        type="VisionTransformerBackbone",
        arch=dict(embed_dims=24, depth=2, num_heads=3),
        img_size=32,
        patch_size=8,
    )
    head = dict(type="LinearHead", num_classes=10, in_channels=24)
    model = MODELS.build(dict(type="PatchClassifier", backbone=backbone, head=head)).to(dtype)
    model.load_state_dict(from_official(golden.group("deit/sd")))
    images, targets = golden["deit/images"].to(dtype), golden["deit/targets"]
    model.eval()
    with torch.no_grad():
        assert error(model(images), golden["deit/eval/logits"]) < outputs
        for index, block in enumerate(model.backbone(images, out_blocks=(0, 1)).blocks):
            assert error(block, golden[f"deit/eval/block{index}/tokens"]) < outputs
    model.train()
    loss = model.loss(images, samples(targets))["loss_cls"]
    assert error(loss, golden["deit/train/loss"]) < outputs
    loss.backward()
    expected = from_official(golden.group("deit/train/grad"))
    found = {name: value.grad for name, value in model.named_parameters()}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert error(found[name], gradient) < gradients, name


@DTYPES
@pytest.mark.parametrize(
    ("case", "label_smooth", "target"),
    [("soft_ce", 0.1, "soft_targets"), ("smooth_ce", 0.1, "labels"), ("ce", 0.0, "labels")],
)
def test_class_loss(dtype, case, label_smooth, target):
    outputs, gradients = limits(dtype)
    golden = load("dge", "losses")
    student = golden["a/student"].to(dtype).requires_grad_()
    value = CrossEntropyLoss(label_smooth)(student, golden[f"a/{target}"])
    value.backward()
    assert error(value, golden[f"a/{case}/value"]) < outputs
    assert error(student.grad, golden[f"a/{case}/g_student"]) < gradients


@DTYPES
@pytest.mark.parametrize(
    ("case", "mode", "tau"),
    [("soft_kd_tau1", "soft", 1.0), ("soft_kd_tau3", "soft", 3.0), ("hard_kd", "hard", 1.0)],
)
def test_distillation_loss(dtype, case, mode, tau):
    outputs, gradients = limits(dtype)
    golden = load("dge", "losses")
    student = golden["a/student"].to(dtype).requires_grad_()
    student_dist = golden["a/student_dist"].to(dtype).requires_grad_()
    base = CrossEntropyLoss()(student, golden["a/soft_targets"])
    loss = DGEDistillationLoss(mode, alpha=float(golden["a/alpha"]), tau=tau)
    value = total(loss(base, student_dist, golden["a/teacher"].to(dtype)))
    value.backward()
    assert error(value, golden[f"a/{case}/value"]) < outputs
    assert error(student.grad, golden[f"a/{case}/g_student"]) < gradients
    assert error(student_dist.grad, golden[f"a/{case}/g_student_dist"]) < gradients


@DTYPES
def test_drop_path(dtype):
    golden = load("dge", "losses")
    x, uniform = golden["a/drop_path/x"].to(dtype), golden["a/drop_path/u"].to(dtype)
    assert (
        error(drop_path(x, uniform.squeeze(1), 0.3), golden["a/drop_path/out"]) < limits(dtype)[0]
    )


@pytest.mark.parametrize(
    ("case", "lr", "warmup"),
    [("lr_deit_w32", 1e-3, 5), ("lr_dge_w32", 1e-3, 20), ("lr_dge_w8", 2.5e-4, 20)],
)
def test_learning_rate_per_epoch(case, lr, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = DeiTCosineLR(optimizer, T_max=300, warmup_epochs=warmup)
    found = []
    for _ in range(300):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(load("dge", "schedules")[case].tolist(), rel=1e-15)


def test_learning_rate_per_iteration():
    expected = load("dge", "schedules")["lr_linear_warmup"]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.5e-4)
    scheduler = DeiTCosineLR.build_iter_from_epoch(
        optimizer, T_max=12, warmup_epochs=3, linear_warmup=True, epoch_length=7
    )
    found = torch.empty(expected.numel(), dtype=torch.float64)
    for iteration in range(expected.numel()):
        found[iteration] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    # The official code adds the increments one by one, which rounds differently.
    assert torch.allclose(found.view_as(expected), expected, rtol=1e-13, atol=0)


def recipe_optimizer(model: nn.Module, project_root, lr: float):
    """Optimiser of the DeiT schedule config without mixed precision."""
    cfg = Config.fromfile(
        str(project_root / "configs/_base_/schedules/adamw_deit.py")
    ).optim_wrapper
    cfg.type = "OptimWrapper"
    cfg.optimizer.lr = lr
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.get(cfg.pop("constructor"))
    return constructor(cfg, cfg.pop("paramwise_cfg"))(model)


@pytest.mark.parametrize("case", ["wd_deit_dge", "wd_deit"])
def test_weight_decay_groups(case, project_root):
    expected = from_official(load("dge", "schedules").group(f"{case}/wd"))
    kind = "DGEVisionTransformerBackbone" if case == "wd_deit_dge" else "VisionTransformerBackbone"
    model = classifier(dims=12, depth=1, type=kind)
    wrapper = recipe_optimizer(model, project_root, 1e-3)
    decay = {id(p): g["weight_decay"] for g in wrapper.param_groups for p in g["params"]}
    found = {name: decay[id(value)] for name, value in model.named_parameters()}
    assert found == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-7
    )
    assert set(found.values()) == {0.0, 0.05}


@DTYPES
def test_two_steps_and_average(dtype, project_root):
    golden = load("dge", "schedules")
    model = classifier(dims=16, depth=2, heads=2, classes=6, img_size=32, patch_size=4).to(dtype)
    model.load_state_dict(from_official(golden.group("two_steps/sd")))
    model.train()
    wrapper = recipe_optimizer(model, project_root, 1e-3)
    average = ModelEMA(deepcopy(model), momentum=0.1)
    for step in range(2):
        name = f"two_steps/it{step}"
        noise = [golden[f"{name}/block{index}/gumbel"] for index in range(2)]
        losses = model.loss(
            golden[f"{name}/images"].to(dtype), samples(golden[f"{name}/targets"]), noise
        )
        found = torch.stack([losses["loss_cls"].double(), losses["loss_dge"]])
        assert error(found, golden["two_steps/losses"][step]) < limits(dtype)[0]
        wrapper.update_params(total(losses))
        average.update_parameters(model)
    for state, key in ((model, "after"), (average.module, "ema")):
        found = to_official(state.state_dict())
        expected = golden.group(f"two_steps/{key}")
        assert set(found) == set(expected)
        for name, value in expected.items():
            if dtype == torch.float64:
                assert error(found[name], value) < 1e-9, name
            else:
                # AdamW divides by tiny second moments: entries may be off by two learning rates.
                assert (found[name].double() - value.double()).abs().max() < 2e-3 + 1e-6, name
        assert torch.equal(found["blocks.0.dge.splits"], expected["blocks.0.dge.splits"])


def routing_of(model: nn.Module, choices: list[torch.Tensor]) -> Routing:
    """The record of a pass with given choices on the 16 x 16 grid."""
    routing = Routing(constants=model.backbone.embedding_macs((16, 16)))
    routing.add_constant(model.head.macs())
    for block, choice in zip(model.backbone.blocks, choices, strict=True):
        cost = block.cost(257)
        queries = row_lengths(choice, SPLITS, 16, 16, 1).double()
        routing.blocks.append(BlockRouting(cost, cost, queries, choice, None, (16, 16), SPLITS))
    return routing


def full_size(arch: str, width: int) -> nn.Module:
    backbone = dict(type="DGEVisionTransformerBackbone", arch=arch, img_size=256)
    head = dict(type="LinearHead", num_classes=1000, in_channels=width)
    with torch.device("meta"):
        return MODELS.build(dict(type="DGEClassifier", backbone=backbone, head=head))


@pytest.mark.parametrize(("arch", "width"), [("tiny", 192), ("small", 384)])
def test_complexity(arch, width):
    golden = load("dge", "complexity")
    name = f"deit_dge_s124_{arch}_patch16_256"
    choices = [golden[f"{name}/block{index}/choice"] for index in range(12)]
    routing = routing_of(full_size(arch, width), choices)
    for accounting in ("upstream", "corrected"):
        static, dynamic = routing.static(accounting), routing.dynamic(accounting)
        loss = DGEBudgetLoss(0.5)(dynamic, static)
        mean = float(dynamic.mean())
        assert [static, mean, mean / static, float(loss)] == pytest.approx(
            golden[f"{name}/{accounting}"].tolist(), rel=1e-12
        )
    blocks = Routing(blocks=routing.blocks)
    assert torch.equal(blocks.dynamic("upstream"), golden[f"{name}/blocks_dynamic"])
    assert [blocks.static("upstream")] * 2 == golden[f"{name}/blocks_static"].tolist()


@pytest.mark.parametrize(
    ("arch", "width", "upstream", "at_2x2", "at_1x1", "corrected"),
    [
        ("tiny", 192, 1_680_085_164, 596_262_828, 325_307_244, 1_717_391_532),
        ("small", 384, 6_088_696_152, 2_222_358_360, 1_255_773_912, 6_163_308_888),
        ("base", 768, 23_091_495_600, 8_564_047_536, 4_932_185_520, 23_240_721_072),
    ],
)
def test_static_and_extreme_costs(arch, width, upstream, at_2x2, at_1x1, corrected):
    model = full_size(arch, width)
    found = []
    for candidate in range(3):
        choice = torch.full((1, 4, 4), candidate)
        routing = routing_of(model, [choice] * 12)
        assert routing.static("upstream") == upstream
        assert routing.static("corrected") == corrected
        found.append(routing.dynamic("upstream").item())
    # All regions at the finest grid cost what the dense twin costs: the ratio is 1.
    assert found == [upstream, at_2x2, at_1x1]
    assert model.backbone.macs((16, 16)) + model.head.macs() == corrected
