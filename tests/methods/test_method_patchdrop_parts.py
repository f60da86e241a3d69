"""Parts of PatchDrop beyond the reference: options, baselines, patch-wise classifiers, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dge_helpers import Sample
from mmengine.registry import init_default_scope
from patchdrop_helpers import feed_draws, labelled, patchdrop, policy, wide

from patchreg.methods.patchdrop.hook import active_patches, alpha_at
from patchreg.methods.patchdrop.mask import cut_patches, mask_patches
from patchreg.methods.patchdrop.selector import (
    bounded_probability,
    keep_best,
    log_probability,
    pattern_order,
)
from patchreg.models.base import fill_predictions
from patchreg.registry import HOOKS, METRICS, MODELS
from patchreg.utils.errors import CheckpointError, ConfigError, DataError
from patchreg.utils.random import batch_random


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope("patchreg")


def build(**config: Any) -> Any:
    return MODELS.build(config)


# rewards ----------------------------------------------------------------------------------------


def test_rewards_of_the_specification() -> None:
    loss = build(type="PatchDropPolicyLoss", penalty=-0.5)
    kept = torch.tensor([0, 1, 4, 8, 12, 16])
    actions = (torch.arange(16) < kept[:, None]).float()
    right, wrong = loss.values(actions)
    assert right.flatten().tolist() == [1.0, 0.99609375, 0.9375, 0.75, 0.4375, 0.0]
    assert wrong.flatten().tolist() == [-0.5] * 6
    reward, match = loss.reward(torch.zeros(6, 3), torch.tensor([0, 0, 0, 1, 1, 2]), actions)
    assert match.tolist() == [True] * 3 + [False] * 3, "ties go to the lowest class"
    assert torch.equal(reward, torch.where(match[:, None], right, wrong))


def test_prices_replace_the_count() -> None:
    loss = build(type="PatchDropPolicyLoss", prices=[0.0, 1.0, 3.0, 0.0])
    actions = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]])
    assert loss.share(actions).flatten().tolist() == [0.0, 0.25, 0.75, 1.0]
    assert loss.values(actions)[0].flatten().tolist() == [1.0, 1 - 0.0625, 1 - 0.5625, 0.0]
    for kind in (torch.int64, torch.bool):
        assert torch.equal(loss.share(actions.to(kind)), loss.share(actions))
    with pytest.raises(ConfigError, match="4 prices for 16"):
        loss.share(torch.ones(1, 16))
    with pytest.raises(ConfigError, match="none below 0"):
        build(type="PatchDropPolicyLoss", prices=[-1.0, 2.0])


def test_a_price_moves_the_advantage_and_not_the_reported_reward() -> None:
    loss = build(type="PatchDropPolicyLoss", penalty=-2.0)
    loss.surcharge.fill_(0.5)
    actions = (torch.arange(16) < torch.tensor([[8], [4]])).float()
    assert loss.charge(actions).flatten().tolist() == [0.25, 0.125]
    assert loss.values(actions)[0].flatten().tolist() == [0.75, 0.9375]
    assert {"surcharge", "gap"} == set(loss.state_dict())
    model = patchdrop("pretrain").double().train()
    images, targets, u = torch.randn(8, 3, 32, 32).double(), torch.arange(8), torch.rand(8, 16)
    losses = []
    for price in (0.0, 0.3):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        feed_draws(model, [u])
        model.policy_loss.surcharge.fill_(price)
        losses.append(model.loss(images, labelled(targets)))
    step = model.last_step
    more = 0.3 * (step.sampled - step.greedy).mean(1, keepdim=True)
    log_prob = log_probability(step.sampled, step.probability)
    assert losses[0]["sampled_reward"] == losses[1]["sampled_reward"]
    difference = losses[1]["loss_policy"] - losses[0]["loss_policy"]
    assert abs(difference - (log_prob * more).mean()).item() < 1e-12


def test_reductions() -> None:
    log_prob, advantage = torch.full((3, 16), -0.5), torch.tensor([[1.0], [2.0], [-1.0]])
    found = {
        name: build(type="PatchDropPolicyLoss", reduction=name)(log_prob, advantage).item()
        for name in ("patch_mean", "patch_sum", "sum")
    }
    assert found == {
        "patch_mean": pytest.approx(1 / 3),
        "patch_sum": pytest.approx(16 / 3),
        "sum": 16,
    }
    active = (torch.arange(16) < 4).float()
    loss = build(type="PatchDropPolicyLoss")
    assert loss(log_prob, advantage, active).item() == pytest.approx(1 / 12)


def test_a_positive_penalty_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="rewards wrong answers"):
        build(type="PatchDropPolicyLoss", penalty=1.0)


# policy -----------------------------------------------------------------------------------------


def test_saturated_logits_stay_finite() -> None:
    logits = torch.tensor([[110.0, -110.0, 0.0, 1.0]], requires_grad=True)
    bounded = bounded_probability(logits.sigmoid(), 1.0)
    value = log_probability(torch.tensor([[0.0, 1.0, 1.0, 1.0]]), bounded)
    assert torch.isfinite(value).all()
    value.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert value[0, 0].item() == pytest.approx(math.log(torch.finfo(torch.float32).eps), rel=1e-3)


def test_training_and_test_agree_on_the_greedy_action() -> None:
    selector = build(**policy())
    probability = torch.tensor([[0.5, 0.49999, 0.50001, 0.0, 1.0] + [0.3] * 11])
    for alpha in (0.51, 0.8, 1.0):
        bounded = bounded_probability(probability, alpha)
        assert torch.equal(selector.greedy(bounded).bool(), selector.decide(probability))
    assert selector.decide(probability)[0, :5].tolist() == [True, False, True, False, True]


def test_gradient_of_the_log_probability() -> None:
    logits = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    actions = (torch.rand(5, 16) < 0.5).double()
    p = logits.sigmoid()
    b = bounded_probability(p, 0.7)
    (found,) = torch.autograd.grad(log_probability(actions, b).sum(), logits)
    expected = 0.4 * p * (1 - p) * (actions / b - (1 - actions) / (1 - b))
    assert (found - expected).abs().max() < 1e-12


def test_thresholds_counts_and_least_patches() -> None:
    probability = torch.tensor([[0.1, 0.9, 0.6, 0.6]])
    selector = build(**policy(num_patches=4, threshold=0.7))
    assert selector.decide(probability)[0].tolist() == [False, True, False, False]
    selector.min_keep = 2
    assert selector.decide(probability)[0].tolist() == [False, True, True, False]
    selector.top_k = 3
    assert selector.decide(probability)[0].tolist() == [False, True, True, True]
    assert keep_best(probability, 0).sum() == 0


@pytest.mark.parametrize("alpha", [0.5, 0.3, 1.01])
def test_alpha_outside_its_range(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"outside \(0.5, 1\]"):
        build(**policy(alpha=alpha))
    with pytest.raises(ConfigError, match=r"outside \(0.5, 1\]"):
        HOOKS.build(dict(type="PatchDropAlphaHook", start=alpha))


def test_schedules() -> None:
    found = [alpha_at(epoch, 6, 0.7, 0.95) for epoch in (0, 1, 5, 9)]
    assert found == pytest.approx([0.7, 0.75, 0.95, 0.95])
    assert active_patches(0, 16).tolist() == [1.0] + [0.0] * 15
    assert active_patches(15, 16).sum() == 16
    assert active_patches(16, 16) is None


# baselines --------------------------------------------------------------------------------------


def test_fixed_patterns_on_a_grid() -> None:
    assert sorted(pattern_order("rows", (4, 4))[:8].tolist()) == list(range(4, 12))
    assert sorted(pattern_order("rows", (4, 4))[:4].tolist()) == list(range(4, 8))
    assert sorted(pattern_order("columns", (4, 4))[:4].tolist()) == [1, 5, 9, 13]
    assert sorted(pattern_order("centre", (4, 4))[:4].tolist()) == [5, 6, 9, 10]
    assert sorted(pattern_order("centre", (3, 3))[:5].tolist()) == [1, 3, 4, 5, 7]


@pytest.mark.parametrize("pattern", ["rows", "columns", "centre", "stochastic", "random"])
@pytest.mark.parametrize("keep", [6, 7.25])
def test_baselines_keep_as_many_as_told(pattern: str, keep: float) -> None:
    selector = build(type="PatchDropFixedSelector", pattern=pattern, keep=keep).eval()
    logits, macs = selector(torch.zeros(4000, 3, 8, 8))
    kept = selector.decide(logits.sigmoid())
    assert macs == 0
    assert kept.sum(1).float().mean().item() == pytest.approx(keep, abs=0.03)
    assert set(kept.sum(1).tolist()) == ({6} if keep == 6 else {7, 8})
    again, _ = selector.eval()(torch.zeros(4000, 3, 8, 8))
    assert torch.equal(again, logits), "an evaluation draws the same again"
    share = kept.float().mean(0).view(4, 4)
    if pattern == "random":
        assert (share - keep / 16).abs().max() < 0.03
    if pattern == "stochastic":
        assert share[1:3, 1:3].mean() > 1.3 * share[[0, 0, 3, 3], [0, 3, 0, 3]].mean()


def test_ends() -> None:
    for pattern, kept in (("all", 16), ("none", 0)):
        selector = build(type="PatchDropFixedSelector", pattern=pattern)
        assert (selector(torch.zeros(3, 3, 8, 8))[0] > 0).sum(1).tolist() == [kept] * 3


@pytest.mark.parametrize("pattern", ["random", "stochastic"])
def test_a_training_draws_fixed_policies_by_the_step(pattern: str) -> None:
    selector = build(type="PatchDropFixedSelector", pattern=pattern, keep=5.5)
    found = []
    for step in (3, 4, 3):
        batch_random.begin(0, step)
        found.append(selector.train()(torch.zeros(8, 3, 8, 8))[0])
        selector.eval()(torch.zeros(8, 3, 8, 8))  # Such as of PatchDropBudgetHook.
        batch_random.end()
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_a_fixed_policy_trains_the_classifier_alone() -> None:
    fixed = dict(type="PatchDropFixedSelector", pattern="rows", keep=4)
    with pytest.raises(ConfigError, match="trains the policy alone, and a PatchDropFixedSelector"):
        patchdrop("pretrain", selector=fixed).train().loss(
            torch.randn(4, 3, 32, 32), labelled(torch.arange(4))
        )
    model = patchdrop(
        "finetune", selector=dict(type="PatchDropFixedSelector", pattern="centre", keep=4)
    ).train()
    losses = model.loss(torch.randn(4, 3, 32, 32), labelled(torch.arange(4)))
    assert set(losses) & {"loss_policy", "loss_cls"} == {"loss_cls"}
    losses["loss_cls"].backward()
    assert losses["sampled_kept"] == losses["greedy_kept"] == 4


# masks ------------------------------------------------------------------------------------------


def test_grids_of_other_shapes() -> None:
    images = torch.randn(2, 3, 24, 32)
    actions = torch.zeros(2, 8)
    actions[:, 5] = 1
    found = mask_patches(images, actions, (2, 4))
    assert torch.equal(found[:, :, 12:, 8:16], images[:, :, 12:, 8:16])
    assert found.count_nonzero() == images[:, :, 12:, 8:16].count_nonzero()
    assert torch.equal(cut_patches(images, (2, 4))[:, 5], images[:, :, 12:, 8:16])


def test_dropped_patches_become_what_is_given() -> None:
    images, fill = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    actions = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1]])
    found = mask_patches(images, actions, (2, 2), fill=fill)
    assert torch.equal(found[0, :, :4, :4], images[0, :, :4, :4])
    assert torch.equal(found[0, :, 4:], fill[0, :, 4:])
    model = patchdrop(fill="overview").eval()
    image = torch.randn(1, 3, 32, 32)
    blurred = image[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3)
    nothing = model.classify(image, torch.zeros(1, 16), model.overview(image))[0]
    assert torch.allclose(nothing, model.classifier(blurred), atol=1e-6)


@pytest.mark.parametrize("value", [0.5, float("nan"), 2.0])
def test_actions_that_are_no_decisions(value: float) -> None:
    actions = torch.ones(2, 16)
    actions[1, 3] = value
    with pytest.raises(DataError, match="kept \\(1\\) or dropped \\(0\\)"):
        mask_patches(torch.zeros(2, 3, 32, 32), actions)


def test_grids_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="cannot be cut into 4 x 4"):
        mask_patches(torch.zeros(1, 3, 30, 32), torch.ones(1, 16))
    with pytest.raises(DataError, match="does not fit into"):
        mask_patches(torch.zeros(1, 3, 30, 32), torch.ones(1, 16), patch_size=8)
    with pytest.raises(ConfigError, match="num_patches=16 does not fit a grid of 8 x 8"):
        patchdrop(grid=(8, 8))


# the model --------------------------------------------------------------------------------------


def one_step(model: Any, images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    losses = model.train().loss(images, labelled(targets))
    sum(value for key, value in losses.items() if "loss" in key).backward()
    return losses


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "twostream"])
def test_frozen_parts_stay_bit_identical(stage: str) -> None:
    model = patchdrop(stage)
    parts = model.frozen_parts()
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    assert len(parts) == {"pretrain": 1, "finetune": 0, "twostream": 1}[stage]
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        one_step(model, torch.randn(8, 3, 32, 32), torch.arange(8))
        optimiser.step()
    for part, state in zip(parts, before, strict=True):
        assert not part.training
        for name, value in part.state_dict().items():
            assert torch.equal(value, state[name]), name


def test_gradients_do_not_cross() -> None:
    torch.manual_seed(0)
    model = patchdrop("finetune").train()
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8)
    losses = model.loss(images, labelled(targets))
    agent = torch.autograd.grad(
        losses["loss_cls"], list(model.selector.parameters()), allow_unused=True, retain_graph=True
    )
    classifier = torch.autograd.grad(
        losses["loss_policy"], list(model.classifier.parameters()), allow_unused=True
    )
    assert all(gradient is None for gradient in (*agent, *classifier))


def test_no_advantage_no_gradient() -> None:
    model = patchdrop("pretrain").train()
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    model.loss(images, labelled(targets))
    greedy = model.last_step.greedy
    # Draws that sample the greedy action.
    feed_draws(model, [torch.where(greedy.bool(), 0.0, 0.999)])
    one_step(model, images, targets)
    assert torch.equal(model.last_step.sampled, greedy)
    assert all(not value.grad.any() for value in model.selector.parameters())


def test_batch_norm_sees_the_greedy_images_first() -> None:
    model = patchdrop("finetune").train()
    # Counting the cost runs the network too, once.
    model.classifier.backbone.macs((3, 32, 32))
    stem = model.classifier.backbone.bn1
    seen = []
    stem.register_forward_pre_hook(lambda module, inputs: seen.append(torch.is_grad_enabled()))
    model.loss(torch.randn(4, 3, 32, 32), labelled(torch.arange(4)))
    assert seen == [False, True]
    assert stem.num_batches_tracked.item() == 2


def test_two_halves_of_a_batch_give_the_policy_loss_of_the_whole() -> None:
    model = patchdrop("pretrain").double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images, targets, u = torch.randn(8, 3, 32, 32).double(), torch.arange(8), torch.rand(8, 16)
    feed_draws(model, [u, u[::2], u[1::2]])
    whole = model.loss(images, labelled(targets))["loss_policy"]
    halves = [model.loss(images[i::2], labelled(targets[i::2]))["loss_policy"] for i in range(2)]
    assert abs(whole - sum(halves) / 2).item() < 1e-12


def test_same_seed_same_step() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        model = patchdrop("finetune")
        one_step(model, torch.randn(4, 3, 32, 32), torch.arange(4))
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*found)


def test_predictions_selection_and_metric() -> None:
    torch.manual_seed(0)
    model = patchdrop("twostream").eval()
    images, targets = torch.randn(6, 3, 32, 32), torch.arange(6)
    samples = model(images, [Sample(gt_label=t) for t in targets], mode="predict")
    out = model.run(images)
    selection = model.select(images)
    metric = METRICS.build(dict(type="PatchDropPolicyMetric", per_class=True))
    rows = [
        dict(sample.all_items(), pred_label=sample.pred_label, gt_label=sample.gt_label)
        for sample in samples
    ]
    metric.process(None, rows)
    found = metric.compute_metrics(metric.results)
    right = out.logits.argmax(1) == targets
    reward, _ = model.policy_loss.reward(out.logits, targets, out.actions.float())
    assert found["accuracy"] == pytest.approx(100 * right.float().mean().item())
    assert found["reward"] == pytest.approx(reward.mean().item(), abs=1e-6)
    assert found["kept_patches_mean"] == pytest.approx(out.actions.sum(1).float().mean().item())
    assert found["kept_class2"] == out.actions[2].sum().item()
    blank = model.classifier(torch.zeros(1, 3, 32, 32)).argmax().item()
    assert found["blank_accuracy"] == pytest.approx(100 / 6 if blank < 6 else 0.0)
    assert torch.equal(selection.keep, out.actions)
    assert set(selection.resolution.unique().tolist()) <= {1.0, 1 / 16}
    # Both classifiers and the policy run for every image.
    policy_macs = model.selector.backbone.macs((3, 8, 8)) + 32 * 16
    dense = model.classifier.backbone.macs((3, 32, 32)) + 320
    low = model.lr_classifier.backbone.macs((3, 8, 8)) + 320
    assert selection.macs.tolist() == [policy_macs + dense + low] * 6
    assert selection.dense_macs == dense


def test_options_of_the_first_version() -> None:
    model = patchdrop("finetune", classifier_mode="eval").train()
    assert not model.classifier.training
    assert next(model.classifier.parameters()).requires_grad
    assert model.selector.training
    weighted = patchdrop("twostream", fusion="weighted")
    high, low = torch.ones(1, 10), torch.zeros(1, 10)
    assert weighted.fuse(high, low, torch.ones(1, 16))[0, 0] == 1
    assert weighted.fuse(high, low, (torch.arange(16) < 4).float()[None])[0, 0] == 0.25


def test_a_curriculum_keeps_what_it_has_not_reached() -> None:
    model = patchdrop("pretrain").train()
    model.active = active_patches(3, 16)
    one_step(model, torch.randn(4, 3, 32, 32), torch.arange(4))
    step = model.last_step
    assert step.sampled[:, 4:].all()
    assert step.greedy[:, 4:].all()
    assert not model.selector.logit.weight.grad[4:].any()
    assert model.run(torch.randn(2, 3, 32, 32)).actions[:, 4:].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(stage="training"), "stage='training' is unknown"),
        (dict(stage="twostream", lr_classifier=None), "lr_classifier missing"),
        (dict(lr_classifier=wide(4)), "belongs to stage 'twostream'"),
        (dict(fill="black"), "fill='black' is unknown"),
        (dict(fusion="mean"), "fusion='mean' is unknown"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        patchdrop(**change)


def test_inputs_that_cannot_be_used() -> None:
    model = patchdrop("finetune").train()
    with pytest.raises(DataError, match="smaller than the low-resolution view"):
        model.loss(torch.zeros(2, 3, 4, 4), labelled(torch.arange(2)))
    with pytest.raises(DataError, match=r"batch of 1 image\(s\) leaves a BatchNorm one value"):
        model(torch.zeros(1, 3, 32, 32), labelled(torch.arange(1)), mode="loss")
    with pytest.raises(DataError, match="one label per image"):
        model.loss(torch.zeros(2, 3, 32, 32), [Sample(gt_score=torch.ones(10))] * 2)
    with pytest.raises(DataError, match="NaN probabilities"):
        model.loss(torch.full((2, 3, 32, 32), float("nan")), labelled(torch.arange(2)))


def test_frozen_parts_need_weights(tmp_path: Any) -> None:
    model = patchdrop("pretrain", random_parts=False)
    with pytest.raises(ConfigError, match=r"does not train model.classifier, which has no weights"):
        model.init_weights()
    model = patchdrop("twostream", random_parts=False)
    with pytest.raises(ConfigError, match=r"does not train model.lr_classifier"):
        model.init_weights()
    # Weights of the whole model count for what they hold: a file of stage 2 has one stream.
    for stage, fits in (("finetune", False), ("twostream", True)):
        path = tmp_path / f"{stage}.pth"
        torch.save(dict(state_dict=patchdrop(stage).state_dict()), path)
        whole = dict(type="Pretrained", checkpoint=str(path))
        model = patchdrop("twostream", random_parts=False, init_cfg=whole)
        if fits:
            model.require_weights()
            continue
        with pytest.raises(ConfigError, match=r"does not train model.lr_classifier"):
            model.init_weights()


def with_weights(name: str, path: Any, prefix: str | None = None, **kwargs: Any) -> Any:
    source = dict(type="Pretrained", checkpoint=str(path))
    if prefix:
        source["prefix"] = prefix
    part = {"classifier": wide(4), "selector": policy(4)}[name]
    return patchdrop(**{name: {**part, "init_cfg": source}}, **kwargs)


def test_weights_of_earlier_stages(tmp_path: Any) -> None:
    first, second = tmp_path / "hr.pth", tmp_path / "pretrain.pth"
    stage = patchdrop("pretrain")
    torch.save(dict(state_dict=stage.classifier.state_dict()), first)
    torch.save(dict(state_dict=stage.state_dict()), second)
    model = with_weights("classifier", first, random_parts=False)
    model.init_weights()
    for found, expected in zip(
        model.classifier.parameters(), stage.classifier.parameters(), strict=True
    ):
        assert torch.equal(found, expected)
    model = with_weights("selector", second, "selector.", stage="finetune")
    model.init_weights()
    assert torch.equal(model.selector.logit.weight, stage.selector.logit.weight)
    with pytest.raises(CheckpointError, match="is of another stage: it holds backbone, head"):
        with_weights("selector", first, "selector.").init_weights()
    with pytest.raises(CheckpointError, match="whole PatchDrop checkpoint"):
        with_weights("classifier", second).init_weights()
    torch.save(dict(state_dict=MODELS.build(wide(4, classes=7)).state_dict()), first)
    with pytest.raises(CheckpointError, match="other shapes"):
        with_weights("classifier", first).init_weights()


# patch-wise classifiers -------------------------------------------------------------------------


TOKENS = dict(
    type="PatchDropTokenClassifier",
    backbone=dict(
        type="VisionTransformerBackbone",
        arch=dict(embed_dims=24, depth=2, num_heads=3),
        img_size=32,
        patch_size=4,
    ),
    head=dict(type="LinearHead", num_classes=10, in_channels=24),
)


def token_classifier(**kwargs: Any) -> Any:
    return build(**TOKENS, **kwargs)


def bag_classifier(**kwargs: Any) -> Any:
    return build(
        type="PatchDropBagClassifier",
        backbone=dict(type="ThinCIFARResNetBackbone", depth=8),
        head=dict(type="LinearHead", num_classes=10, in_channels=64, pool="mean", init="torch"),
        **kwargs,
    )


def some_actions() -> torch.Tensor:
    actions = torch.rand(7, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    actions[2], actions[4] = False, True
    return actions.float()


def test_tokens_of_all_patches_are_the_plain_transformer() -> None:
    model = token_classifier().double().eval()
    images = torch.randn(3, 3, 32, 32).double()
    plain = model.head(model.backbone(images))
    assert (model(images) - plain).abs().max() < 1e-12


@pytest.mark.parametrize("make", [token_classifier, bag_classifier])
def test_dropped_patches_are_not_looked_at(make: Any) -> None:
    model = make().double().eval()
    images, actions = torch.randn(7, 3, 32, 32).double(), some_actions()
    logits, macs, dense = model.classify(images, actions, (4, 4))
    changed = mask_patches(images, actions, fill=torch.randn_like(images))
    assert (model.classify(changed, actions, (4, 4))[0] - logits).abs().max() < 1e-12
    for index in range(7):
        alone = model.classify(images[index : index + 1], actions[index : index + 1], (4, 4))
        assert (alone[0] - logits[index]).abs().max() < 1e-12
        assert alone[1].item() == macs[index].item()
    assert macs[4].item() == dense
    assert macs[2] < 0.1 * dense
    order = actions.sum(1).argsort()
    assert (macs[order].diff() >= 0).all()


def test_a_bag_averages_the_logits_of_its_patches() -> None:
    model = bag_classifier().double().eval()
    images, actions = torch.randn(7, 3, 32, 32).double(), some_actions()
    logits, macs, _ = model.classify(images, actions, (4, 4))
    patches = cut_patches(images, (4, 4))
    for index in (0, 1, 3):
        kept = patches[index, actions[index].bool()]
        each = model.head(model.backbone(kept))
        assert (each.mean(0) - logits[index]).abs().max() < 1e-12
    assert (logits[2] - model.head.head.bias).abs().max() < 1e-12
    per_patch = model.backbone.macs((3, 8, 8))
    assert macs.tolist() == [n * per_patch + 640 for n in actions.sum(1).tolist()]


@pytest.mark.parametrize("make", [token_classifier, bag_classifier])
def test_patchwise_classifiers_train_on_some_patches(make: Any) -> None:
    model = make(train_keep=(2, 6)).train()
    images, targets = torch.randn(6, 3, 32, 32), torch.arange(6)
    features = model.extract(images)
    one = model.extract_kept(images[:1], (torch.arange(16) < 6).float()[None], (4, 4)).macs
    assert (features.macs <= one.item()).all()
    assert features.macs.unique().numel() == 1
    model.loss(images, labelled(targets))["loss_cls"].backward()
    assert all(value.grad is not None for value in model.parameters())
    with pytest.raises(ConfigError, match="fewest <= most <= 16"):
        make(train_keep=(0, 3))


def test_a_patchwise_classifier_in_the_whole_model() -> None:
    model = patchdrop(classifier=TOKENS, stage="finetune")
    one_step(model, torch.randn(4, 3, 32, 32), torch.arange(4))
    out = model.eval().run(torch.randn(4, 3, 32, 32))
    few = model.selector
    few.top_k = 2
    assert (model.run(torch.randn(4, 3, 32, 32)).macs < out.dense_macs).all()


def test_the_loop_that_the_benchmark_compares_with_gives_the_same() -> None:
    from patchreg.benchmarks.patchdrop import mask_by_patches

    images, actions = torch.randn(3, 3, 16, 16), (torch.rand(3, 16) < 0.5).float()
    assert torch.equal(mask_by_patches(images, actions), mask_patches(images, actions))


# networks and views -----------------------------------------------------------------------------


def test_views_that_average() -> None:
    images = torch.randn(2, 3, 32, 32)
    view = dict(type="LowResolutionViewPreprocessor", size=8)
    area = build(**view, mode="area")(images)
    assert torch.allclose(area, torch.nn.functional.avg_pool2d(images, 4), atol=1e-6)
    smooth = build(**view, mode="bilinear")(images)
    assert smooth.std() < 0.4 * images.std() < build(**view)(images).std()
    assert build(type="LowResolutionViewPreprocessor", size=32)(images) is images
    normalise = build(type="ImagePreprocessor", mean=(0, 0, 0), std=(1, 1, 1), view=view)
    given = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = normalise(dict(inputs=given))["inputs"]
    assert torch.equal(found, given[:, :, ::4, ::4].float())


@pytest.mark.parametrize(
    "config",
    [
        dict(type="LowResolutionViewPreprocessor", size=0),
        dict(type="LowResolutionViewPreprocessor", size=8, enlarge_to=4),
        dict(type="LowResolutionViewPreprocessor", size=8, mode="cubic"),
        dict(type="ThinCIFARResNetBackbone", depth=10),
        dict(type="CIFARResNetBackbone", num_blocks=(1, 1, 0, 1)),
        dict(type="PatchDropFixedSelector", pattern="circle"),
        dict(type="PatchDropFixedSelector", pattern="rows", keep=17),
        dict(type="PatchDropPolicyLoss", reduction="mean"),
        dict(type="PatchDropPolicyLoss", form="linear"),
        policy(pool="max"),
        policy(threshold=1.0),
        policy(top_k=17),
    ],
)
def test_values_that_mean_nothing(config: dict) -> None:
    with pytest.raises(ConfigError):
        build(**config)


# what does not fit together -----------------------------------------------------------------------

BAG = dict(
    type="PatchDropBagClassifier",
    backbone=dict(type="CIFARResNetBackbone", num_blocks=(1, 1, 1, 1), base_channels=4),
    head=dict(type="LinearHead", num_classes=10, in_channels=32, pool="mean", init="torch"),
)


@pytest.mark.parametrize("options", [dict(patch_size=4), dict(fill="overview"), dict(patch_size=0)])
def test_patchwise_classifiers_read_whole_grids(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="patch_size="):
        patchdrop("finetune", classifier=BAG, **options)


def test_a_bag_without_a_patch_leaves_the_statistics_alone() -> None:
    bag = build(**BAG).train()
    before = {key: value.clone() for key, value in bag.state_dict().items()}
    bag.classify(torch.randn(2, 3, 32, 32), torch.zeros(2, 16), (4, 4))
    assert all(torch.equal(value, before[key]) for key, value in bag.state_dict().items())
    assert bag.backbone.bn1.training


def test_equal_scores_leave_the_prediction_of_the_logits() -> None:
    logits = torch.tensor([[1e-9, 3e-9, 2e-9]])
    (sample,) = fill_predictions([Sample()], logits, torch.zeros(1), 0.0)
    assert sample.pred_label.item() == 1


def test_what_nothing_predicts_counts_both_streams() -> None:
    model = patchdrop("twostream").eval()
    images = torch.randn(6, 3, 32, 32)
    seen = model.lr_classifier(model.overview(images))
    nothing = model.classify(torch.zeros(1, 3, 32, 32), torch.zeros(1, 16), torch.zeros(1, 3, 8, 8))
    assert model.blank_labels(images) == (seen + nothing[0]).argmax(1).tolist()


def test_policies_that_contradict_themselves() -> None:
    with pytest.raises(ConfigError, match="top_k=2 keeps fewer patches than min_keep=5"):
        build(**policy(4, top_k=2, min_keep=5))
