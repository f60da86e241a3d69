"""The whole game against the official code: sizes, one round, training steps."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from golden_reader import load
from patchgame_helpers import (
    build,
    cases,
    error,
    filled,
    images,
    metadata,
    model_config,
    near,
    official_name,
    parameter,
    relative,
    vit,
)
from torch import Tensor, nn

from patchreg.losses.contrastive import NEVER, matching_accuracy
from patchreg.registry import MODELS
from patchreg.utils.errors import ConfigError, DataError
from patchreg.utils.random import batch_random
from patchreg.utils.schedules import linear_warmup, warmup_cosine

SIZES = [
    (dict(), 72_251_586, 72_213_762, 513),
    (dict(patch_size=16), 71_978_562, 71_827_842, 513),
    (dict(use_context=False), 68_524_866, 68_524_866, 363),
    (dict(sender_arch="vit_tiny"), 73_284_034, 73_246_018, 591),
    (dict(receiver_arch="resnet50"), 87_728_834, 87_691_010, 711),
    (dict(receiver_arch="vit_small"), 83_306_882, 83_269_058, 543),
    (dict(receiver_dim=1024), 39_092_418, 39_054_594, 513),
]


@pytest.fixture(scope="module")
def default() -> Any:
    return build()


@pytest.mark.parametrize(("case", "whole", "trained", "entries"), SIZES)
def test_sizes(
    case: dict[str, Any],
    whole: int,
    trained: int,
    entries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Numbers of values do not depend on what is drawn, and drawing 70 million takes seconds.
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **kwargs: tensor)
    model = build(**case)
    values = list(model.parameters())
    assert sum(value.numel() for value in values) == whole
    assert sum(value.numel() for value in values if value.requires_grad) == trained
    assert len(model.state_dict()) == entries


def test_parts_of_the_default(default: Any) -> None:
    def size(part: nn.Module) -> int:
        return sum(value.numel() for value in part.parameters())

    sender, receiver = default.sender, default.receiver
    assert size(sender.patch_rank) == 4_905_792
    assert size(sender.ranker) == 513
    assert size(sender.patch_symbol) == 5_938_560
    assert size(sender.lin_symbol) == 148_224
    assert size(default.gumbel) == 98_432
    assert size(receiver.vision) == 11_176_512
    assert size(receiver.vision_fc) == 22_614_272
    assert size(receiver.embedding) == 24_576
    assert size(receiver.encoder) == 5_338_368
    assert size(receiver.text_fc) == 21_958_912
    assert float(default.logit_scale.detach()) == pytest.approx(2.6592600)


def test_starting_weights(default: Any) -> None:
    layers = default.receiver.encoder.layers
    assert torch.equal(layers[0].linear1.weight, layers[11].linear1.weight)
    assert float(default.receiver.vision.model.layer1[0].bn2.weight.detach().abs().max()) == 0
    assert float(default.sender.patch_rank.model.layer1[0].bn2.weight.detach().min()) == 1
    for name, std in (("embedding.weight", 0.02), ("position_encoding", 0.01)):
        found = float(parameter(default, f"receiver.{name}").detach().std())
        assert found == pytest.approx(std, rel=0.05)
    assert not default.sender.pe_symbol.requires_grad
    assert not default.sender.patch_symbol.cls_token.requires_grad
    config = model_config(image_size=96, receiver_dim=8, num_layers=2)
    apart = MODELS.build(dict(config, copied_layers=False)).receiver.encoder.layers
    assert not torch.equal(apart[0].linear1.weight, apart[1].linear1.weight)


def test_cost_of_ranking(default: Any) -> None:
    for side, macs in ((224, 0.889e9), (384, 2.612e9)):
        selection = default.select(torch.zeros(1, 3, side, side))
        assert selection.grid == (side // 32, side // 32)
        assert float(selection.macs[0]) == pytest.approx(macs, rel=1e-3)
        selection.validate()
    assert default.sender.patch_symbol.matmul_macs((7, 7)) == pytest.approx(0.294e9, rel=0.05)
    fine = MODELS.build(dict(type="PatchGameResNetBackbone", stride=16))
    assert fine.macs((3, 224, 224)) == pytest.approx(1.428e9, rel=1e-3)
    assert fine.macs((3, 384, 384)) == pytest.approx(4.197e9, rel=1e-3)
    assert tuple(fine.eval()(torch.zeros(1, 3, 96, 96)).shape) == (1, 512, 6, 6)


@pytest.mark.parametrize("case", cases("patchgame_small"), ids=lambda case: case["tag"])
def test_round_golden(case: dict[str, Any]) -> None:
    golden, tag = load("patchgame", "patchgame_small"), case["tag"]
    model = filled(build(**case)).train(case["train"])
    model.gumbel.set_temperature(case["T"])
    views = [images(golden, f"{tag}.im_{side}_u8") for side in ("sender", "receiver")]
    uniforms = [golden.get(f"{tag}.uniform_{kind}") for kind in ("select", "symbol")]
    played = model.play(*views, *uniforms)
    loss, logits, target = model.loss_module(played.image, played.text, model.logit_scale.exp())
    loss.backward()
    near(played.score, golden[f"{tag}.score"], 1e-3, 1e-4)
    near(played.selected, golden[f"{tag}.selected"], 1e-3, 1e-4)
    near(played.symbol_logits, golden[f"{tag}.symbol_logits"], 1e-3, 1e-4)
    near(played.message, golden[f"{tag}.message"], 1e-3, 1e-4)
    near(played.image.rows, golden[f"{tag}.im_embed"], 0, 1e-4)
    near(played.text.rows, golden[f"{tag}.m_embed"], 0, 1e-4)
    near(logits, golden[f"{tag}.logits"], 0, 1e-3)
    near(loss, golden[f"{tag}.loss"], 1e-4, 0)
    assert torch.equal(target, golden[f"{tag}.labels"])
    grads = {
        official_name(name): value.grad
        for name, value in model.named_parameters()
        if value.grad is not None
    }
    for key in [name for name in golden if name.startswith(f"{tag}.grad.")]:
        name, expected = key.removeprefix(f"{tag}.grad."), golden[key]
        if name.endswith("ranker.1.bias") and case["sender_norm"] == "sort":
            # Ranks do not change when all scores rise.
            assert float(grads[name].abs()) < 1e-6
        else:
            assert relative(grads[name], expected) < 2e-3, name
    for key in [name for name in golden if name.startswith(f"{tag}.gradnorm.")]:
        found = grads[key.removeprefix(f"{tag}.gradnorm.")].norm()
        assert relative(found, golden[key]) < 2e-3, key
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    assert relative(norm, golden[f"{tag}.grad_total_norm"]) < 2e-3
    if case["topk"]:
        assert played.selected.round().sum(1).tolist() == [case["topk"]] * len(loss.new_ones(5))


def test_default_golden() -> None:
    golden = load("patchgame", "patchgame_default")
    logits, labels = golden["logits"], golden["labels"]
    top1, top2 = matching_accuracy(logits, labels, (1, 2))
    near(nn.functional.cross_entropy(logits, labels), golden["loss"], 1e-5, 0)
    assert float(top1) == pytest.approx(golden["top1"].item(), abs=1e-3)
    assert float(top2) == pytest.approx(golden["top2"].item(), abs=1e-3)
    if "im_sender_u8" not in golden:
        return
    case = {
        key: json.loads(value) if value[0] in "0123456789ntf" else value
        for key, value in metadata("patchgame_default").items()
    }
    model = filled(build(**case)).eval()
    views = [images(golden, f"im_{side}_u8") for side in ("sender", "receiver")]
    with torch.no_grad():
        played = model.play(*views, golden["uniform_select"], golden["uniform_symbol"])
        scale = model.logit_scale.exp()
        loss, logits, target = model.loss_module(played.image, played.text, scale)
        near(model.features(views[1]), golden["vision_feature"], 1e-3, 1e-5)
    near(played.score, golden["score"], 1e-3, 1e-4)
    near(played.selected, golden["selected"], 1e-3, 1e-4)
    near(played.symbol_logits, golden["symbol_logits"], 1e-3, 1e-4)
    near(played.symbol_embed[..., :16], golden["symbol_embed_first16"], 1e-3, 1e-4)
    assert torch.equal(played.message.argmax(-1), golden["message_ids"])
    for side, name in ((played.image, "im"), (played.text, "m")):
        near(side.rows[:, :64], golden[f"{name}_embed_first64"], 1e-3, 1e-5)
        near(side.rows.norm(dim=1), golden[f"{name}_embed_norm"], 1e-3, 1e-5)
    near(logits, golden["logits"], 1e-4, 1e-4)
    near(loss, golden["loss"], 1e-4, 0)
    assert torch.equal(target, labels)


def optimiser(model: nn.Module, kind: str) -> Any:
    """The optimiser of the method's configs, for a model in float64 or float32."""
    from mmengine.registry import init_default_scope

    from patchreg.registry import OPTIM_WRAPPER_CONSTRUCTORS

    init_default_scope("patchreg")
    settings = dict(type="AdamW") if kind == "adamw" else dict(type="SGD", momentum=0.9)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(
            type="GroupedOptimWrapperConstructor",
            optim_wrapper_cfg=dict(
                type="OptimWrapper", optimizer=dict(settings, lr=1.0, weight_decay=1.0)
            ),
            paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
        )
    )
    return constructor(model).optimizer


@pytest.mark.parametrize("run", cases("train_steps", "runs"), ids=lambda run: run["tag"])
def test_training_steps_golden(run: dict[str, Any]) -> None:
    golden, tag = load("patchgame", "train_steps"), run["tag"]
    size, epochs = run["niter"], run["epochs"]
    steps = size * epochs
    schedule = {
        "lr": [
            warmup_cosine(step, steps, run["lr"], 0.05 * run["lr"], run["warm"] * size)
            for step in range(steps)
        ],
        "wd": [warmup_cosine(step, steps, 0.04, 0.4) for step in range(steps)],
        "temperature": [linear_warmup(step, run["T0"], 1.0, size) for step in range(steps)],
    }
    for name, values in schedule.items():
        near(torch.tensor(values), golden[f"{tag}.{name}"], 1e-6, 1e-8)
    if "batch0.im_sender_u8" not in golden:
        return
    case = next(case for case in cases("patchgame_small") if case["tag"] == "train")
    case.update(image_size=run["size"], topk=run.get("topk"), patch_size=run.get("patch_size", 32))
    model = filled(build(**case)).train()
    first = {official_name(key): value.clone() for key, value in model.state_dict().items()}
    optimizer = optimiser(model, run["opt"])
    frozen = [value for name, value in model.named_parameters() if "last_layer" in name]
    draws = iter(range(2 * steps))
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule["lr"][step]
            group["weight_decay"] = schedule["wd"][step] if group["weight_decay"] else 0.0
        model.gumbel.set_temperature(schedule["temperature"][step])
        views = [
            images(golden, f"batch{step % size}.im_{side}_u8") for side in ("sender", "receiver")
        ]
        uniforms = [golden[f"{tag}.uniform.{next(draws)}"] for _ in range(2)]
        played = model.play(*views, *uniforms)
        loss, _, _ = model.loss_module(played.image, played.text, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        if step // size < run["freeze"]:
            for value in frozen:
                value.grad = None
        optimizer.step()
        losses.append(float(loss.detach()))
        state = {official_name(key): value for key, value in model.state_dict().items()}
        if (step + 1) % size:
            continue
        start = f"{tag}.epoch{step // size}."
        for key in [name for name in golden if name.startswith(start)]:
            name = key.removeprefix(start)
            moved, expected = state[name] - first[name], golden[key] - first[name]
            if not expected.any():
                assert torch.equal(state[name], golden[key]), name
            else:
                assert relative(moved, expected) < 2e-2, name
    near(torch.tensor(losses), golden[f"{tag}.losses"], 1e-3, 0)
    near(torch.tensor(losses), golden[f"{tag}.losses_f64"], 1e-3, 0)
    for name, norm in zip(run["names"], golden[f"{tag}.update_norms"].tolist(), strict=True):
        found = float((state[name].double() - first[name].double()).norm())
        if name != "sender.ranker.1.bias":
            assert found == pytest.approx(norm, rel=2e-2, abs=1e-7), name


TINY = dict(embed_dims=24, depth=2, num_heads=2)


def small(**options: Any) -> dict[str, Any]:
    """Config of a small model for images of 16 px with patches of 4."""
    config = dict(
        type="PatchGamePretrainer",
        backbone=vit(TINY, 4, 16),
        ranker=vit(TINY, 4, 16),
        selector=dict(type="RankSelector"),
        symbol=vit(TINY, 4, 16),
        loss=dict(type="ContrastiveLoss"),
        head=dict(out_dim=40, hidden_dim=32, bottleneck_dim=16),
        img_size=16,
        patch_size=4,
        hidden_dim=20,
        vocab_size=12,
        text_dims=24,
        text_heads=2,
        text_layers=2,
    )
    config.update(options)
    return config


def test_draws_are_keyed_and_evaluation_is_free_of_noise() -> None:
    model = MODELS.build(small()).train()
    views = torch.randn(2, 6, 3, 16, 16)

    def played(key: int | None) -> Tensor:
        if key is not None:
            batch_random.begin(seed=1, step=key)
        return model.play(*views).message

    assert torch.equal(played(3), played(3))
    assert not torch.equal(played(3), played(4))
    model.eval()
    batch_random.end()
    assert torch.equal(played(None), played(None))
    model.eval_noise = True
    assert not torch.equal(played(None), played(None))


def test_parts_of_a_global_batch_draw_its_rows() -> None:
    model = MODELS.build(small(drop_rate=0.5)).train()
    views = torch.randn(2, 6, 3, 16, 16)
    batch_random.begin(seed=1, step=3)
    whole = model.play(*views)
    for rank in range(2):
        batch_random.begin(seed=1, step=3, rank=rank, world=2)
        part = model.play(*views[:, rank::2])
        assert error(part.message, whole.message[rank::2]) < 1e-5
        assert error(part.score, whole.score[rank::2]) < 1e-5


def test_other_image_sizes_work() -> None:
    for options in (dict(), dict(symbol=None), dict(max_len=3)):
        model = MODELS.build(small(**options)).train()
        losses = model(torch.randn(2, 4, 3, 24, 32).unbind(0), mode="loss")
        assert torch.isfinite(losses["loss_contrast"])
        losses["loss_contrast"].backward()
    assert model.symbols(torch.randn(2, 3, 24, 32)).shape == (2, 48, 3)
    with pytest.raises(DataError, match="patches of 4 px"):
        model(torch.randn(2, 4, 3, 18, 18).unbind(0), mode="loss")
    for part in (model.select, model.symbols):
        with pytest.raises(DataError, match="patches of 4 px"):
            part(torch.randn(2, 3, 18, 18))


def test_every_trained_parameter_gets_a_gradient() -> None:
    for options in (dict(), dict(symbol=None), dict(trainable_temperature=True, hard=False)):
        model = MODELS.build(small(**options)).train()
        losses = model(torch.randn(2, 4, 3, 16, 16).unbind(0), mode="loss")
        losses["loss_contrast"].backward()
        trained = [name for name, value in model.named_parameters() if value.requires_grad]
        assert not [name for name in trained if model.get_parameter(name).grad is None]


def test_topk_is_held_against_the_patches_at_hand() -> None:
    model = MODELS.build(small(selector=dict(type="RankSelector", topk=17))).eval()
    assert model.select(torch.randn(2, 3, 24, 24)).keep.sum(1).tolist() == [17, 17]
    with pytest.raises(DataError, match="cannot keep 17 of 16"):
        model.select(torch.randn(2, 3, 16, 16))


def test_predict_counts_better_matches() -> None:
    model = MODELS.build(small()).eval()
    found = model(torch.randn(2, 5, 3, 16, 16).unbind(0), mode="predict")
    assert len(found) == 5
    for sample in found:
        assert sample["match_place"].shape == (2,)
        assert 0 <= int(sample["match_place"].min()) <= int(sample["match_place"].max()) < 5
        assert sample["match_count"] == 5
    # A model that says the same of all images is right by chance only, and a broken one never.
    for gain, places in ((0.0, [0, 1, 2, 3, 4]), (math.nan, [NEVER] * 5)):
        for head in (model.receiver.vision_fc, model.receiver.text_fc):
            torch.nn.init.constant_(head.last_layer.weight_g, gain)
        found = model(torch.randn(2, 5, 3, 16, 16).unbind(0), mode="predict")
        assert [sample["match_place"].tolist() for sample in found] == [[n, n] for n in places]
    with pytest.raises(ConfigError, match="two views"):
        model(torch.randn(5, 3, 16, 16), mode="loss")
    with pytest.raises(ValueError, match="mode='train'"):
        model(torch.randn(5, 3, 16, 16), mode="train")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(img_size=18), "no multiple"),
        (dict(patch_size=8), "the same patches"),
        (dict(ranker=dict(type="PatchGameResNetBackbone"), img_size=32), "the same patches"),
        (dict(ranker=dict(type="PatchGameResNetBackbone", stride=8)), "VisionTransformerBackbone"),
        (dict(vocab_size=1), "vocab_size=1"),
        (dict(max_len=0), "max_len=0"),
        (dict(temperature=0.0), "temperature=0"),
        (dict(text_heads=5), "num_heads=5"),
        (dict(text_layers=0), "text_layers=0"),
        (dict(drop_rate=1.0), "drop_rate=1.0"),
        (dict(backbone=vit(TINY, 4, 16, cls_token=False)), "cls_token"),
    ],
)
def test_misfits_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MODELS.build(small(**options))


def test_parameter_groups(default: Any) -> None:
    groups = optimiser(default, "adamw").param_groups
    decayed = [group for group in groups if group["weight_decay"]]
    plain = [group for group in groups if not group["weight_decay"]]
    assert (len(decayed), len(plain)) == (1, 1)
    for group, tensors, values in ((decayed[0], 147, 72_128_321), (plain[0], 268, 85_441)):
        trained = [value for value in group["params"] if value.requires_grad]
        assert len(trained) == tensors
        assert sum(value.numel() for value in trained) == values
    assert any(value is default.logit_scale for value in decayed[0]["params"])
    assert math.isclose(float(default.logit_scale.detach()), math.log(1 / 0.07), rel_tol=1e-6)
