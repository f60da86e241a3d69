"""Backbone, head, optimiser and schedules of PW-Self against the authors' code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import golden_reader
import pytest
import torch
from pwself_helpers import backbone, below, cast, error, head, tolerance

from patchreg.hooks.freeze import FreezeLastLayerHook
from patchreg.models.layers import resize_pos_embed
from patchreg.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS, PARAM_SCHEDULERS
from patchreg.runner.optim import OptimWrapper, clip_each_gradient
from patchreg.runner.schedules import WarmupCosineParamScheduler
from patchreg.utils.errors import ConfigError, DataError
from patchreg.utils.random import batch_random
from patchreg.utils.schedules import linear_warmup, warmup_cosine

TYPES = (torch.float64, torch.float32)


@pytest.mark.parametrize("dtype", TYPES)
def test_backbone_gives_the_tokens_and_gradients_of_the_authors(dtype: torch.dtype) -> None:
    golden = golden_reader.load("pwself", "model")
    model = backbone().to(dtype).eval()
    model.load_state_dict(below(golden, "a.param.", dtype))
    cases = sorted({name.split(".")[1] for name in golden if name.startswith("a.in")})
    assert cases
    for case in cases:
        want = below(golden, f"a.{case}.", dtype)
        x = want["x"].requires_grad_()
        model.zero_grad()
        features = model(x)
        assert error(features.tokens, want["tokens"]) < tolerance(dtype)
        (features.tokens * want["w"]).sum().backward()
        assert error(x.grad, want["grad_x"]) < tolerance(dtype, "gradient")
        for name in (
            "pos_embed",
            "cls_token",
            "blocks.0.attn.qkv.weight",
            "patch_embed.proj.weight",
        ):
            found = model.get_parameter(name).grad
            assert error(found, want[f"grad.{name}"]) < tolerance(dtype, "gradient")
        square = x.shape[2] == x.shape[3]
        assert error(model.position_embedding(features.grid, square), want["pos"]) < tolerance(
            dtype
        )
        assert error(model.last_attention(x), want["last_attn"]) < tolerance(dtype)
        older, newest = model.last_blocks(x, 2)
        assert error(older, want["inter0"]) < tolerance(dtype)
        assert error(newest, want["inter1"]) < tolerance(dtype)


def test_position_embedding_is_not_that_of_a_plain_resize() -> None:
    model = backbone()
    plain = resize_pos_embed(model.pos_embed, (4, 4), (2, 2), 1)
    assert error(model.position_embedding((2, 2)), plain) > 1e-3
    # As many patches in another shape are interpolated, a square image is not.
    assert torch.equal(model.position_embedding((4, 4)), model.pos_embed)
    assert not torch.equal(model.position_embedding((2, 8), False), model.pos_embed)


def test_remainder_of_an_image_is_left_out() -> None:
    model = backbone().eval()
    x = torch.randn(1, 3, 39, 48)
    assert error(model(x).tokens, model(x[:, :, :32]).tokens) < 1e-6
    with pytest.raises(DataError, match="7 x 48"):
        model(x[:, :, :7])


@pytest.mark.parametrize("dtype", TYPES)
def test_stochastic_depth_drops_what_the_authors_drop(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = golden_reader.load("pwself", "model")
    if "a.drop.x" not in golden:
        pytest.skip("the compact set has no stochastic depth; PATCHREG_GOLDEN names the full one")
    model = backbone(drop_path_rate=0.3).to(dtype).train()
    model.load_state_dict(below(golden, "a.param.", dtype))
    rates = [block.drop_path_rate for block in model.blocks]
    assert rates == pytest.approx(golden["a.drop.rates"].tolist())
    drawn = golden["a.drop.u"].to(dtype).view(2, 2, 5)
    uniform = torch.zeros(5, 3, 2, dtype=dtype)
    uniform[:, 1:] = drawn.permute(2, 0, 1)
    monkeypatch.setattr(batch_random, "uniform", lambda *_: uniform)
    found = model(golden["a.drop.x"].to(dtype)).tokens
    assert error(found, golden["a.drop.tokens"]) < tolerance(dtype)


HEADS: dict[str, dict[str, Any]] = {
    "head_tok": {},
    "head_free_g": dict(norm_last_layer=False),
    "head_1layer": dict(num_layers=1),
    "head_bn_cls": dict(use_bn=True),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "name", [name for name in HEADS if f"{name}.x" in golden_reader.load("pwself", "model")]
)
def test_head_gives_the_numbers_of_the_authors(name: str, dtype: torch.dtype) -> None:
    golden = golden_reader.load("pwself", "model")
    want = below(golden, f"{name}.", dtype)
    model = head(**HEADS[name]).to(dtype).train()
    model.load_state_dict(below(golden, f"{name}.param.", dtype))
    x = want["x"].requires_grad_()
    y = model(x)
    assert error(y, want["y"]) < tolerance(dtype)
    (y * want["w"]).sum().backward()
    assert error(x.grad, want["grad_x"]) < tolerance(dtype, "gradient")
    graded = {key[5:] for key in want if key.startswith("grad.")}
    assert graded == {key for key, value in model.named_parameters() if value.grad is not None}
    for key in graded:
        found, expected = model.get_parameter(key).grad, want[f"grad.{key}"]
        if name == "head_bn_cls" and key in ("mlp.0.bias", "mlp.3.bias"):
            # Batch norm takes a constant away again: the exact gradient is 0.
            assert (found - expected).abs().max() < 1e-4
        else:
            assert error(found, expected) < tolerance(dtype, "gradient")
    state = model.state_dict()
    for key, expected in want.items():
        if key.startswith("after."):
            assert error(state[key[6:]], expected) < tolerance(dtype)
    if "y_eval" in want:
        assert error(model.eval()(x), want["y_eval"]) < tolerance(dtype)


def test_head_refuses_batch_norm_on_tokens() -> None:
    with pytest.raises(DataError, match="use_bn=False"):
        head(use_bn=True)(torch.zeros(2, 5, 24))


@pytest.mark.parametrize(
    ("dims", "out_dim", "count"),
    [
        (384, 1000, 5_766_376),
        (384, 10_000, 8_079_376),
        (384, 65_536, 22_352_128),
        (768, 1000, 6_552_808),
        (768, 10_000, 8_865_808),
        (768, 65_536, 23_138_560),
        (192, 1000, 5_373_160),
        (192, 10_000, 7_686_160),
        (192, 65_536, 21_958_912),
    ],
)
def test_head_has_the_published_size(dims: int, out_dim: int, count: int) -> None:
    from patchreg.models.heads import ProjectionHead

    with torch.device("meta"):
        model = ProjectionHead(dims, out_dim)
    assert sum(value.numel() for value in model.parameters()) == count
    # Every weight but the gains and the biases is used once per token.
    assert model.macs() == count - out_dim - 2048 - 2048 - 256


@pytest.mark.parametrize("dtype", TYPES)
def test_lars_makes_the_steps_of_the_authors(dtype: torch.dtype) -> None:
    golden = golden_reader.load("pwself", "loss_sched")
    values = [torch.nn.Parameter(cast(golden[f"lars.p{n}.init"], dtype)) for n in range(4)]
    groups = [
        dict(params=[values[0], values[2], values[3]], weight_decay=0.02),
        dict(params=[values[1]], weight_decay=0.0),
    ]
    optimizer = OPTIMIZERS.build(dict(type="LARS", params=groups))
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.3 * (step + 1)
        for number, value in enumerate(values):
            value.grad = cast(golden[f"lars.step{step}.g{number}"], dtype)
        optimizer.step()
        for number, value in enumerate(values):
            expected = golden[f"lars.step{step}.p{number}"]
            assert (value.detach() - expected).abs().max() <= tolerance(dtype) * max(
                1.0, float(expected.abs().max())
            )
    with pytest.raises(ConfigError, match="momentum"):
        OPTIMIZERS.build(dict(type="LARS", params=values, momentum=1.0))


def schedules() -> list[str]:
    return [name for name in ("s_default", "s_boost") if f"{name}.cfg" in sets()]


def sets() -> golden_reader.GoldenFile:
    return golden_reader.load("pwself", "loss_sched")


@pytest.mark.parametrize("name", schedules())
def test_schedules_are_those_of_the_authors(name: str) -> None:
    golden = sets()
    cfg = golden[f"{name}.cfg"].tolist()
    lr, min_lr, decay, decay_end, momentum = cfg[:5]
    epochs, length, warmup = (int(value) for value in cfg[5:8])
    first, last, temperature_epochs = cfg[8], cfg[9], int(cfg[10])
    steps = epochs * length
    weight, bias = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    groups = [dict(params=[weight]), dict(params=[bias], weight_decay=0.0)]
    wrapper = OptimWrapper(torch.optim.AdamW(groups, lr=lr, weight_decay=decay))
    common: dict[str, Any] = dict(
        type="WarmupCosineParamScheduler",
        optimizer=wrapper,
        end=epochs,
        convert_to_iter_based=True,
        epoch_length=length,
    )
    rates = PARAM_SCHEDULERS.build(dict(common, param_name="lr", final=min_lr, warmup=warmup))
    decays = PARAM_SCHEDULERS.build(dict(common, param_name="weight_decay", final=decay_end))
    assert isinstance(rates, WarmupCosineParamScheduler)
    groups = wrapper.optimizer.param_groups
    for step in range(steps):
        assert abs(groups[0]["lr"] - float(golden[f"{name}.lr"][step])) < 1e-9
        assert groups[1]["lr"] == groups[0]["lr"]
        assert abs(groups[0]["weight_decay"] - float(golden[f"{name}.wd"][step])) < 1e-9
        assert groups[1]["weight_decay"] == 0.0
        wrapper.step()
        rates.step()
        decays.step()
    found = [warmup_cosine(step, steps, momentum, 1.0) for step in range(steps)]
    exact = torch.tensor(found, dtype=torch.float64)
    assert (exact - golden[f"{name}.momentum"]).abs().max() < 1e-9
    for epoch in range(epochs):
        found = linear_warmup(epoch, first, last, temperature_epochs)
        assert abs(found - float(golden[f"{name}.teacher_temp"][epoch])) < 1e-9


def test_weight_decay_may_begin_at_zero() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    config = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.0))
    groups = dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0)
    for paramwise, expected in ((groups, [0.4, 0.0]), (None, [0.4])):
        options = dict(optim_wrapper_cfg=config, paramwise_cfg=paramwise)
        built = dict(options, type="GroupedOptimWrapperConstructor")
        wrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(built)(model)
        decays = WarmupCosineParamScheduler(wrapper, "weight_decay", 0.4, end=20, by_epoch=False)
        assert [group["weight_decay"] for group in wrapper.optimizer.param_groups] == [0.0] * len(
            expected
        )
        for _ in range(19):
            wrapper.step()
            decays.step()
        found = [group["weight_decay"] for group in wrapper.optimizer.param_groups]
        exact = warmup_cosine(19, 20, 0.0, 0.4)
        assert found == [exact if value else 0.0 for value in expected]
        assert exact == pytest.approx(0.3975, abs=1e-4)


def test_schedule_of_an_empty_training_is_refused() -> None:
    wrapper = OptimWrapper(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    with pytest.raises(
        ConfigError, match="the training has no iteration; is train_dataloader.batch"
    ):
        WarmupCosineParamScheduler(wrapper, "lr", 0.0, end=0, by_epoch=False)


def test_default_schedule_has_the_published_values() -> None:
    lr = 5e-4 * 24 / 256
    rates = [warmup_cosine(step, 2000, lr, 1e-6, 200) for step in range(2000)]
    assert rates[0] == 0
    assert rates[199] == rates[200] == pytest.approx(4.6875e-5, abs=1e-18)
    assert rates[1999] == pytest.approx(1.0000349e-6, rel=1e-6)
    assert warmup_cosine(1000, 2000, 0.04, 0.4) == pytest.approx(0.22)
    assert warmup_cosine(1000, 2000, 0.996, 1.0) == pytest.approx(0.998)
    assert linear_warmup(1, 0.04, 0.07, 30) == pytest.approx(0.0410345, abs=5e-8)
    assert linear_warmup(29, 0.04, 0.07, 30) == 0.07
    with pytest.raises(ConfigError, match="warm-up of 11"):
        warmup_cosine(0, 10, 1.0, 0.0, 11)


def test_each_gradient_is_clipped_by_itself() -> None:
    large, small = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(2))
    large.grad, small.grad = torch.full((4,), 5.0), torch.tensor([0.3, 0.4])
    clip_each_gradient([large, small], 3.0)
    assert torch.allclose(large.grad, torch.full((4,), 5.0) * 3.0 / (10.0 + 1e-6))
    assert torch.equal(small.grad, torch.tensor([0.3, 0.4]))
    large.grad = small.grad = None
    wrapper = OptimWrapper(
        torch.optim.SGD([large, small], lr=1.0), clip_grad=dict(type="per_tensor", max_norm=1.5)
    )
    wrapper.update_params((large * 5.0).sum() + (small * torch.tensor([0.3, 0.4])).sum())
    assert torch.allclose(large, torch.full((4,), -0.75))
    assert torch.allclose(small, torch.tensor([-0.3, -0.4]))
    with pytest.raises(ConfigError, match="max_norm above 0"):
        OptimWrapper(
            torch.optim.SGD([large], lr=1.0), clip_grad=dict(type="per_tensor", max_norm=0)
        )


@pytest.mark.parametrize(
    ("arch", "patch", "count"),
    [
        ("tiny", 8, 5_526_720),
        ("tiny", 16, 5_524_416),
        ("tiny", 32, 5_938_560),
        ("small", 8, 21_670_272),
        ("small", 16, 21_665_664),
        ("small", 32, 22_493_952),
        ("base", 8, 85_807_872),
        ("base", 16, 85_798_656),
        ("base", 32, 87_455_232),
    ],
)
def test_backbone_has_the_published_size(arch: str, patch: int, count: int) -> None:
    from patchreg.models.backbones import VisionTransformerBackbone

    with torch.device("meta"):
        model = VisionTransformerBackbone(arch, patch_size=patch)
    assert sum(value.numel() for value in model.parameters()) == count


@pytest.mark.parametrize(
    ("arch", "patch", "large", "small"),
    [
        ("small", 16, 4.598, 0.809),
        ("small", 8, 22.405, 3.283),
        ("base", 8, 78.148, 12.724),
        ("tiny", 16, 1.253, 0.208),
    ],
)
def test_backbone_has_the_published_cost(arch: str, patch: int, large: float, small: float) -> None:
    from patchreg.models.backbones import VisionTransformerBackbone

    with torch.device("meta"):
        model = VisionTransformerBackbone(arch, patch_size=patch)
    for side, expected in ((224, large), (96, small)):
        grid = (side // patch, side // patch)
        assert round(model.matmul_macs(grid) / 1e9, 3) == expected
        assert model.macs(grid) > model.matmul_macs(grid)


def test_last_layer_is_not_stepped_in_the_first_epochs() -> None:
    model = torch.nn.ModuleDict(dict(mlp=torch.nn.Linear(2, 2), last_layer=torch.nn.Linear(2, 2)))
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5))
    runner = SimpleNamespace(model=model, optim_wrapper=wrapper, epoch=0)
    hook = FreezeLastLayerHook(epochs=1)
    hook.before_train(runner)

    def step() -> tuple[bool, bool]:
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        wrapper.update_params(model["last_layer"](model["mlp"](torch.ones(1, 2))).sum())
        moved = {
            name: not torch.equal(value, before[name]) for name, value in model.named_parameters()
        }
        return moved["mlp.weight"], moved["last_layer.weight"]

    assert step() == (True, False)
    assert model["last_layer"].weight not in wrapper.optimizer.state
    runner.epoch = 1
    assert step() == (True, True)
    assert wrapper.optimizer.state[model["last_layer"].weight]["step"] == 1
    runner.epoch = 0
    hook.after_train(runner)
    assert step() == (True, True)
    with pytest.raises(ConfigError, match="no parameter has 'first'"):
        FreezeLastLayerHook(name="first").before_train(runner)
