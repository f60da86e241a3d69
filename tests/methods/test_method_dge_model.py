"""Behaviour of the DeiT-DGE model: paths, options, odd inputs, selection, messages."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from dge_helpers import classifier, error, force_choice, samples, spread_routers, total
from patchreg_ops import row_lengths, row_plan
from torch import nn
from torch.utils.checkpoint import checkpoint

from patchreg.methods.dge.block import DGEBlock
from patchreg.methods.dge.convert import (
    from_official,
    merge_qkv,
    split_qkv,
    to_official,
)
from patchreg.methods.dge.router import DGERouter, region_mean
from patchreg.registry import MODELS
from patchreg.utils.errors import CheckpointError, ConfigError, DataError
from patchreg.utils.random import batch_random


def lively(**kwargs) -> nn.Module:
    """A float64 classifier that uses every granularity."""
    return spread_routers(classifier(**kwargs)).double()


def images(batch: int = 3, height: int = 64, width: int = 64, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def soft_targets(batch: int = 3, classes: int = 10) -> torch.Tensor:
    return torch.rand(batch, classes, generator=torch.Generator().manual_seed(2)).softmax(1)


def zero_noise(model: nn.Module, batch: int, regions: tuple[int, int]) -> list[torch.Tensor]:
    shape = (batch, *regions, len(model.backbone.splits))
    return [torch.zeros(shape, dtype=torch.float64)] * model.backbone.depth


# ---- paths ----

GRIDS = [
    pytest.param(64, 64, {}, id="square"),
    pytest.param(64, 96, {}, id="wide"),
    pytest.param(96, 32, dict(img_size=(96, 32)), id="tall-design"),
    pytest.param(56, 72, dict(region_padding=True), id="padded"),
    pytest.param(40, 24, dict(region_padding=True), id="padded-one-column"),
]


@pytest.mark.parametrize(("height", "width", "options"), GRIDS)
@pytest.mark.parametrize("splits", [(4, 2, 1), (1, 2, 4), (2, 1), (6, 3), (4,)], ids=str)
def test_sparse_evaluation_equals_dense_and_training_without_noise(height, width, options, splits):
    model = lively(splits=splits, **(dict(region_padding=True) | options)).eval()
    batch = images(3, height, width)
    with torch.no_grad():
        features = model.extract(batch)
        sparse = model.backbone(batch).tokens
        model.backbone.eval_path = "dense"
        dense = model.backbone(batch).tokens
        noise = zero_noise(model, 3, features.routing.blocks[0].choice.shape[1:])
        trained = model.train().backbone(batch, noise=noise)
    assert error(sparse, dense) < 1e-12
    assert error(trained.tokens, dense) < 1e-12
    chosen = torch.cat([block.choice.flatten() for block in features.routing.blocks])
    assert len(chosen.unique()) == len(splits)
    for block, drawn in zip(features.routing.blocks, trained.routing.blocks, strict=True):
        expected = row_lengths(block.choice, splits, *features.grid, 1).double()
        assert torch.equal(block.queries, expected)
        assert torch.allclose(drawn.queries, expected, rtol=1e-12)


def test_float32_paths_agree():
    model = spread_routers(classifier()).eval()
    batch = images().float()
    with torch.no_grad():
        sparse = model(batch)
        model.backbone.eval_path = "dense"
        assert error(sparse, model(batch)) < 1e-5


def test_sparse_and_dense_training_share_outputs_and_late_gradients():
    results = {}
    for sparse in (False, True):
        model = lively(sparse_train=sparse).train()
        noise = batch_noise(model)
        losses = model.loss(images(), samples(soft_targets()), noise)
        total(losses).backward()
        grads = {name: value.grad for name, value in model.named_parameters()}
        results[sparse] = (losses["loss_cls"], grads)
    assert error(results[True][0], results[False][0]) < 1e-12
    last = [name for name in results[True][1] if "blocks.2." in name and "router" not in name]
    assert len(last) == 14
    for name in last:
        assert error(results[True][1][name], results[False][1][name]) < 1e-10, name
    # Before the last block the two differ: sparse training tells only the chosen gate.
    name = "backbone.blocks.0.dge.router.gate.weight"
    assert error(results[True][1][name], results[False][1][name]) > 1e-2


def batch_noise(model: nn.Module, batch: int = 3, seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 2, 2, len(model.backbone.splits))
    return [
        -torch.rand(shape, generator=generator, dtype=torch.float64).log().neg().log()
        for _ in range(model.backbone.depth)
    ]


def test_skipping_the_last_patch_queries_changes_no_logit():
    model = lively().eval()
    batch = images()
    with torch.no_grad():
        full, cost = model(batch), model.cost(model.extract(batch))
        model.backbone.skip_last_queries = True
        skipped = model(batch)
        features = model.extract(batch)
    assert error(skipped, full) < 1e-12
    assert len(features.routing.routed) == 2
    fewer, dense = model.cost(features)
    assert dense == cost[1]
    last = model.backbone.blocks[-1].cost(65)
    before = model.extract(batch).routing  # same choices in the first two blocks
    assert torch.equal(before.blocks[0].queries, features.routing.blocks[0].queries)
    spared = last.per_query("corrected") * (cost_queries(model, batch) - 1) + 65 / 16 * 24 * 4
    assert torch.allclose(cost[0] - fewer, spared, rtol=1e-12)


def cost_queries(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    model.backbone.skip_last_queries = False
    with torch.no_grad():
        return model.extract(batch).routing.blocks[-1].queries


def test_all_fine_is_the_plain_transformer_on_grids_the_region_does_not_divide():
    plain = MODELS.build(
        dict(
            type="PatchClassifier",
            backbone=dict(
                type="VisionTransformerBackbone",
                arch=dict(embed_dims=24, depth=3, num_heads=3),
                img_size=64,
                patch_size=8,
                mlp_ratio=2,
            ),
            head=dict(type="LinearHead", num_classes=10, in_channels=24),
        )
    ).double()
    spread_routers(plain).eval()
    model = classifier(region_padding=True).double().eval()
    report = model.load_state_dict(split_qkv(plain.state_dict()), strict=False)
    assert not report.unexpected_keys
    assert all(".dge." in key for key in report.missing_keys)
    force_choice(model, 0)
    for size in ((64, 64), (40, 56)):
        batch = images(2, *size)
        with torch.no_grad():
            assert error(model(batch), plain(batch)) < 1e-12
            macs, dense = model.cost(model.extract(batch))
        assert macs.tolist() == [dense] * 2
    back = merge_qkv(model.state_dict())
    assert {key: value.tolist() for key, value in back.items()} == {
        key: value.tolist() for key, value in plain.state_dict().items()
    }


def test_region_mean_of_cut_off_regions():
    x = torch.randn(2, 2 + 6 * 5, 3, dtype=torch.float64)
    found = region_mean(x, (6, 5), 2, 4)
    cells = x[:, 2:].view(2, 6, 5, 3)
    for row in range(2):
        for column in range(2):
            part = cells[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(2, -1, 3)
            assert error(found[:, row, column], part.mean(1)) < 1e-14


def test_spatial_reduction_takes_keys_from_squares():
    block = DGEBlock(16, 2, splits=(2, 1), sr_ratio=2, upstream_products=1).double()
    spread_routers(block)
    x = torch.randn(2, 48, 16, dtype=torch.float64)
    noise = torch.zeros(2, 3, 4, 2, dtype=torch.float64)
    dense, record = block(x, (6, 8), 0, "dense", noise)
    sparse, _ = block(x, (6, 8), 0, "sparse", noise)
    assert error(sparse, dense) < 1e-12
    key, _ = block.attn.keys(x, (6, 8))
    assert key.shape == (2, 2, 12, 8)
    cost = record.cost
    assert cost.fixed == 2 * 48 * 16 + 2 * 12 * 256 + 48 * 256 + 12 * 16 + 12 * 16 * 3
    mlp = 2 * 16 * 64 + 64
    assert cost.per_query("upstream") == 2 * 256 + 12 * 16 + 3 * 12 * 2 + mlp
    assert cost.per_query("corrected") == 2 * 256 + 2 * 12 * 16 + 3 * 12 * 2 + mlp


# ---- randomness ----


def test_query_drop_path_belongs_to_image_and_query_number():
    block = DGEBlock(24, 3, drop_path_rate=0.5).double()
    spread_routers(block)
    x = torch.randn(2, 65, 24, dtype=torch.float64)
    noise = torch.randn(2, 2, 2, 3, dtype=torch.float64)
    uniform = torch.full((2, 2, 65), 0.9, dtype=torch.float64)
    plain, record = block(x, (8, 8), 1, "sparse", noise, uniform)
    plan = row_plan(record.choice, (4, 2, 1), 8, 8, 1)
    # Drop both branches of query 2 of the second image: its tokens keep their value, all others
    # theirs.
    uniform[1, :, 2] = 0.1
    dropped, _ = block(x, (8, 8), 1, "sparse", noise, uniform)
    covered = plan.owner == plan.lengths[0] + 2
    assert covered.any()
    assert torch.equal(dropped[covered], x[covered])
    assert torch.equal(dropped[~covered], plain[~covered])
    # Alone in a batch the image gets the same: draws do not depend on the packing.
    alone, _ = block(x[1:], (8, 8), 1, "sparse", noise[1:], uniform[1:])
    assert error(alone[0], dropped[1]) < 1e-12


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_sample_drop_path_drops_whole_images(path):
    block = DGEBlock(24, 3, drop_path_rate=0.25).double()
    spread_routers(block)
    x = torch.randn(3, 65, 24, dtype=torch.float64)
    noise = torch.randn(3, 2, 2, 3, dtype=torch.float64)
    # Keep all, drop all, drop attention only.
    uniform = torch.tensor([[0.9, 0.9], [0.1, 0.1], [0.1, 0.9]], dtype=torch.float64)
    out, _ = block(x, (8, 8), 1, path, noise, uniform)
    assert torch.equal(out[1], x[1])
    assert error(out[0], x[0]) > 0.1
    assert error(out[2], x[2]) > 0.1
    gated = copy.deepcopy(block)
    nn.init.zeros_(gated.attn.proj.weight)
    nn.init.zeros_(gated.attn.proj.bias)
    without, _ = gated(x, (8, 8), 1, path, noise, uniform)
    assert error(without[2], out[2]) < 1e-12


def test_drop_path_rates_and_shapes_of_draws(monkeypatch):
    shapes = []

    def uniform(batch, shape, device, dtype=torch.float32):
        shapes.append((batch, *shape))
        return torch.full((batch, *shape), 0.99, dtype=dtype)

    monkeypatch.setattr(batch_random, "uniform", uniform)
    model = classifier(drop_path_rate=0.2, depth=3).train()
    assert [block.drop_path_rate for block in model.backbone.blocks] == pytest.approx([0, 0.1, 0.2])
    batch = images(2).float()
    model(batch)
    model.backbone.sparse_train = True
    model(batch)
    model.backbone.drop_path_mode = "sample"
    model(batch)
    noise = (2, 3, 2, 2, 3)
    # Router noise first, then drop path, both before the first block.
    assert shapes == [noise, (2, 3, 2, 1 + 64 + 16 + 4), noise, (2, 3, 2, 65), noise, (2, 3, 2)]
    shapes.clear()
    model.eval()
    model(batch)
    assert shapes == []


def test_draws_of_a_split_batch_equal_those_of_the_whole():
    model = lively(drop_path_rate=0.3).train()
    batch = images(4)
    batch_random.begin(7, 11)
    whole = model.backbone(batch).tokens
    for rank in range(2):
        batch_random.begin(7, 11, rank=rank, world=2)
        part = model.backbone(batch[rank::2]).tokens
        assert error(part, whole[rank::2]) < 1e-12
    batch_random.end()


@contextmanager
def no_host_reads():
    """Fail on everything that reads a tensor's value into Python."""
    names = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy")
    saved = {name: getattr(torch.Tensor, name) for name in names}

    def refuse(self, *args, **kwargs):
        raise AssertionError("a tensor was read into Python")

    for name in names:
        setattr(torch.Tensor, name, refuse)
    try:
        yield
    finally:
        for name, method in saved.items():
            setattr(torch.Tensor, name, method)


@pytest.mark.parametrize("mode", ["query", "sample"])
def test_dense_training_reads_no_value_back(mode):
    model = classifier(drop_path_rate=0.1, drop_path_mode=mode).train()
    batch, targets = images().float(), samples(soft_targets())
    with no_host_reads():
        losses = model.loss(batch, targets)
    total(losses).backward()
    with pytest.raises(AssertionError, match="read into Python"), no_host_reads():
        bool(losses["loss_cls"] > 0)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["query", "sample"])
def test_dense_training_never_waits_for_the_gpu(mode):
    model = classifier(drop_path_rate=0.1, drop_path_mode=mode).train().cuda()
    batch, targets = images().float().cuda(), samples(soft_targets().cuda())
    model.loss(batch, targets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.loss(batch, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_agrees_with_cpu(dtype):
    model = spread_routers(classifier()).eval()
    batch = images().float()
    with torch.no_grad():
        expected = model(batch)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            found = model.cuda()(batch.cuda())
    assert error(found.cpu(), expected) < (1e-4 if dtype == torch.float32 else 5e-2)


# ---- budget and gradients ----


def test_budget_gradient_reaches_routers_and_what_feeds_them_only():
    model = lively().train()
    losses = model.loss(images(), samples(soft_targets()), batch_noise(model))
    losses["loss_dge"].backward(retain_graph=True)
    reached = {name for name, value in model.named_parameters() if value.grad is not None}
    reached = {name for name in reached if model.get_parameter(name).grad.abs().max() > 0}
    assert not any(name.startswith(("head.", "backbone.norm.")) for name in reached)
    assert {name for name in reached if "blocks.2." in name} == {
        f"backbone.blocks.2.dge.router.gate.{kind}" for kind in ("weight", "bias")
    }
    assert "backbone.patch_embed.proj.weight" in reached
    assert "backbone.blocks.1.mlp.fc2.weight" in reached
    # The class loss says nothing to the last router: only the class token is read behind it.
    model.zero_grad()
    losses["loss_cls"].backward()
    assert model.backbone.blocks[2].dge.router.gate.weight.grad.abs().max() == 0
    assert model.backbone.blocks[1].dge.router.gate.weight.grad.abs().max() > 0


def test_budget_gradient_of_a_gate_is_its_share_of_the_cost():
    model = lively().train()
    features = model.extract(images(), batch_noise(model))
    routing = features.routing
    dynamic, static = routing.dynamic("upstream"), routing.static("upstream")
    loss = model.budget_loss(dynamic, static)
    (found,) = torch.autograd.grad(loss, routing.blocks[1].queries)
    ratio = float(dynamic.detach().mean()) / static
    slope = routing.blocks[1].cost.per_query("upstream")
    expected = 2 * (ratio - 0.5) * slope / (3 * static)
    assert torch.allclose(found, torch.full_like(found, expected), rtol=1e-12)


def test_two_passes_before_a_loss_do_not_mix():
    model = lively().train()
    noises = batch_noise(model, seed=3), batch_noise(model, seed=4)
    first = model.extract(images(seed=1), noises[0])
    second = model.extract(images(seed=5), noises[1])
    model.eval()
    model(images(seed=6))
    model.train()
    found = model.budget_loss(first.routing.dynamic("upstream"), first.routing.static("upstream"))
    expected = model.loss(images(seed=1), samples(soft_targets()), noises[0])["loss_dge"]
    assert torch.equal(found, expected)
    assert not torch.equal(first.routing.blocks[0].queries, second.routing.blocks[0].queries)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_activation_checkpointing_gives_the_same_gradient(path):
    block = DGEBlock(24, 3).double()
    spread_routers(block)
    noise = torch.randn(2, 2, 2, 3, dtype=torch.float64)
    grads = []
    for save in (True, False):
        x = torch.randn(2, 65, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        args = (x, (8, 8), 1, path, noise)
        out, record = block(*args) if save else checkpoint(block, *args, use_reentrant=False)
        (out.square().sum() + record.queries.sum()).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


# ---- heads and extra tokens ----


def test_distilled_model_returns_both_logits_in_training_and_their_mean_in_evaluation():
    model = lively(dist_token=True, head_distilled=True)
    assert model.backbone.pos_embed.shape[1] == 66
    batch = images()
    model.eval()
    with torch.no_grad():
        tokens = model.backbone(batch).tokens
        first, second = model.head.head(tokens[:, 0]), model.head.head_dist(tokens[:, 1])
        assert error(model(batch), (first + second) / 2) < 1e-14
        pair = model.train()(batch)
    assert isinstance(pair, tuple)
    # The class loss reads the class token only.
    loss = model.loss(batch, samples(soft_targets()), batch_noise(model))["loss_cls"]
    loss.backward()
    assert model.head.head_dist.weight.grad is None
    # Officially the second classifier and the layer before the first one cost nothing.
    static = model.eval().extract(batch).routing.static
    model.head.macs = lambda: 0.0
    without = model.extract(batch).routing.static
    assert static("corrected") - without("corrected") == 2 * 24 * 10
    assert static("upstream") == without("upstream")
    assert static("upstream") - model.backbone(batch).routing.static("upstream") == 24 * 10
    keys = set(to_official(model.state_dict()))
    assert {"dist_token", "head_dist.weight", "head_dist.bias", "head.weight"} <= keys


def test_model_without_class_token_averages_the_normed_tokens():
    model = lively(cls_token=False, head_pool="mean").eval()
    batch = images()
    with torch.no_grad():
        tokens = model.backbone(batch).tokens
        assert tokens.shape == (3, 64, 24)
        assert error(model(batch), model.head.head(tokens.mean(1))) < 1e-14
    assert "backbone.cls_token" not in model.state_dict()


def test_representation_layer_is_linear_and_tanh():
    model = lively(head_representation_size=7).eval()
    batch = images()
    with torch.no_grad():
        hidden = model.head.pre_logits.fc(model.backbone(batch).tokens[:, 0]).tanh()
        assert error(model(batch), model.head.head(hidden)) < 1e-14
    assert "pre_logits.fc.weight" in to_official(model.state_dict())
    assert model.head.macs() == 24 * 7 + 7 * 10


def test_distillation_with_a_frozen_teacher():
    model = spread_routers(
        classifier(
            dist_token=True,
            head_distilled=True,
            model_teacher=dict(type="TimmBackbone", model_name="test_resnet", num_classes=10),
            model_distillation=dict(type="DGEDistillationLoss", mode="hard", alpha=0.25),
        )
    ).train()
    batch, targets = images().float(), soft_targets()
    noise = [value.float() for value in batch_noise(model)]
    losses = model.loss(batch, samples(targets), noise)
    features = model.extract(batch, noise)
    logits, logits_dist = model.head(features)
    decision = model._teacher(batch).argmax(1)
    hard = nn.functional.cross_entropy(logits_dist, decision)
    assert error(losses["loss_distill"], 0.25 * hard) < 1e-5
    assert error(losses["loss_cls"], 0.75 * model.head.loss_module(logits, targets)) < 1e-5
    total(losses).backward()
    assert all(value.grad is None for value in model._teacher.model.parameters())
    # The teacher is neither saved nor averaged.
    assert not any("teacher" in key for key in model.state_dict())
    assert copy.deepcopy(model)._teacher is model._teacher


# ---- initialisation and state ----


@pytest.mark.parametrize(("candidates", "value"), [(3, 1.8188), (2, 1.4722)])
def test_router_starts_with_the_first_candidate_at_095(candidates, value):
    splits = (4, 2, 1)[:candidates] if candidates == 3 else (2, 1)
    model = classifier(dims=192, heads=3, splits=splits)
    model.init_weights()
    for block in model.backbone.blocks:
        gate = block.dge.router.gate
        assert gate.bias.softmax(0)[0].item() == pytest.approx(0.95, abs=1e-6)
        assert gate.bias[0].item() == pytest.approx(value, abs=1e-4)
        assert gate.weight.std().item() == pytest.approx(0.01, rel=0.15)
        assert block.attn.q.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.mlp.fc1.bias.abs().max() == 0
    assert model.backbone.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.head.head.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_single_candidate_router_starts_without_bias():
    router = DGERouter(16, 1)
    assert router.gate.bias.tolist() == [0.0]


def test_official_state_loads_and_saves_back_bit_equal():
    state = spread_routers(classifier(), seed=5).state_dict()
    official = to_official(state)
    assert official["blocks.1.dge.splits"].tolist() == [4, 2, 1]
    assert official["blocks.1.dge.splits"].dtype == torch.int64
    assert len(official) == 59
    model = classifier()
    model.load_state_dict(from_official(official))
    back = to_official(model.state_dict())
    assert set(back) == set(official)
    assert all(torch.equal(back[key], official[key]) for key in official)


def test_checkpoint_of_other_splits_is_refused():
    state = classifier(splits=(4, 2)).state_dict()
    state = {key: value for key, value in state.items() if "gate" not in key}
    with pytest.raises(RuntimeError, match=r"splits is \[4, 2\] in the checkpoint but \[2, 4\]"):
        classifier(splits=(2, 4)).load_state_dict(state, strict=False)


def test_conversion_refuses_foreign_states():
    with pytest.raises(CheckpointError, match=r"'neck\.weight' has no official name"):
        to_official({"neck.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.kv\.weight"):
        merge_qkv({"blocks.0.attn.q.weight": torch.zeros(2, 2)})


# ---- predictions and selection ----


def test_predictions_tell_scores_costs_and_granularities():
    model = lively(model_accounting="corrected").eval()
    batch = images()
    with torch.no_grad():
        logits = model(batch)
        routing = model.extract(batch).routing
        found = model(batch, samples(torch.tensor([1, 2, 3])), mode="predict")
    assert [int(sample.pred_label) for sample in found] == logits.argmax(1).tolist()
    for index, sample in enumerate(found):
        assert error(sample.pred_score, logits[index].softmax(0).float()) < 1e-6
        assert sample.macs == pytest.approx(float(routing.dynamic("corrected")[index]), rel=1e-15)
        assert sample.dense_macs == routing.static("corrected")
        choice = routing.blocks[1].choice[index].flatten()
        assert sample.granularity[1].tolist() == [
            float((choice == k).float().mean()) for k in range(3)
        ]
        assert sample.granularity.shape == (3, 3)


def test_selection_of_regions():
    model = lively().eval()
    batch = images(3, 64, 96)
    selection = model.select(batch)
    selection.validate()
    assert selection.image_size == (64, 96)
    assert selection.grid == (2, 3)
    with torch.no_grad():
        routing = model.extract(batch).routing
    shares = torch.tensor([1.0, 0.25, 0.0625])
    expected = sum(shares[block.choice] for block in routing.blocks) / 3
    assert error(selection.resolution, expected.flatten(1)) < 1e-6
    assert torch.equal(selection.keep, selection.resolution > 0.0626)
    assert torch.equal(selection.macs, routing.dynamic("corrected").detach())
    assert selection.dense_macs == routing.static("corrected")
    # The score never contradicts the resolution; the router's own view only breaks ties.
    higher = selection.resolution[:, :, None] > selection.resolution[:, None, :] + 1e-6
    assert (selection.score[:, :, None] > selection.score[:, None, :])[higher].all()
    assert len(selection.score.unique()) > len(selection.resolution.unique())
    first = int(selection.order[0, 0])
    assert selection.boxes[0, 0].tolist() == [
        first % 3 * 32,
        first // 3 * 32,
        first % 3 * 32 + 32,
        first // 3 * 32 + 32,
    ]


def test_selection_of_cut_off_regions_stays_in_the_image():
    model = lively(region_padding=True).eval()
    force_choice(model, 0)
    selection = model.select(images(1, 40, 56))
    selection.validate()
    assert selection.image_size == (40, 56)
    boxes = {tuple(box) for box in selection.boxes[0].tolist()}
    assert boxes == {(0, 0, 32, 32), (32, 0, 56, 32), (0, 32, 32, 40), (32, 32, 56, 40)}
    assert selection.macs[0].item() == selection.dense_macs


def test_plain_classifier_selects_everything():
    model = MODELS.build(
        dict(
            type="PatchClassifier",
            backbone=dict(type="VisionTransformerBackbone", img_size=32, patch_size=8, arch=ARCH),
            head=dict(type="LinearHead", num_classes=5, in_channels=12),
        )
    ).eval()
    selection = model.select(torch.randn(2, 3, 32, 48))
    selection.validate()
    assert selection.grid == (4, 6)
    assert selection.keep.all()
    count = 25
    block = count * (2 * 12 + 4 * 144 + 2 * 12 * 48 + 48) + 2 * count**2 * 12 + 3 * count**2 * 2
    assert selection.dense_macs == 3 * 64 * 12 * 24 + 2 * block + 12 * 5
    assert selection.macs.tolist() == [selection.dense_macs] * 2


ARCH = dict(embed_dims=12, depth=2, num_heads=2)


# ---- odd but legal inputs ----


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_empty_batch(training, sparse):
    model = classifier(sparse_train=sparse, eval_path="sparse" if sparse else "dense")
    model.train(training)
    assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 10)


def test_one_region():
    model = lively(img_size=32).eval()
    batch = images(2, 32, 32)
    with torch.no_grad():
        sparse = model(batch)
        model.backbone.eval_path = "dense"
        assert error(sparse, model(batch)) < 1e-12


def test_non_contiguous_images():
    model = lively().eval()
    batch = images()
    with torch.no_grad():
        assert error(model(batch.to(memory_format=torch.channels_last)), model(batch)) < 1e-12


@pytest.mark.parametrize("training", [False, True])
def test_half_precision_by_autocast(training):
    model = spread_routers(classifier()).train(training)
    batch, targets = images().float(), samples(soft_targets())
    # Strong noise: no near tie that rounding could turn over.
    noise = [8 * value.float() for value in batch_noise(model)] if training else None
    with torch.autocast("cpu", torch.bfloat16):
        features = model.extract(batch, noise)
        if training:
            losses = model.loss(batch, targets, noise)
    exact = model.extract(batch, noise)
    assert features.routing.blocks[0].logits.dtype == torch.float32
    for found, expected in zip(features.routing.blocks, exact.routing.blocks, strict=True):
        assert torch.equal(found.choice, expected.choice)
    assert error(features.tokens[:, 0], exact.tokens[:, 0]) < 5e-2
    if training:
        assert losses["loss_cls"].dtype == torch.float32
        total(losses).backward()
        assert model.backbone.blocks[0].attn.q.weight.grad.dtype == torch.float32


def test_half_precision_model():
    model = spread_routers(classifier()).eval()
    batch = images().float()
    with torch.no_grad():
        expected = model(batch)
        found = model.to(torch.bfloat16)(batch.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert error(found, expected) < 5e-2


def test_position_embedding_is_resampled_for_other_sizes():
    model = classifier().backbone
    with torch.no_grad():
        model.pos_embed.copy_(torch.randn_like(model.pos_embed))
        tokens, grid = model.embed(torch.zeros(1, 3, 96, 64))
        flat, _ = model.patch_embed(torch.zeros(1, 3, 96, 64))
        embedding = tokens[:, 1:] - flat
    cells = model.pos_embed[:, 1:].view(1, 8, 8, 24).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(cells, (12, 8), mode="bicubic", align_corners=False)
    assert grid == (12, 8)
    assert error(embedding, expected.flatten(2).transpose(1, 2)) < 1e-5
    assert error(tokens[:, 0], model.cls_token[:, 0] + model.pos_embed[:, 0]) < 1e-6


# ---- messages ----


def test_grid_that_the_region_does_not_divide_names_sizes_that_work():
    model = classifier(img_size=56)
    with pytest.raises(
        DataError, match="7 x 7 is not divisible by the region of 4.*32 x 32 or 64 x 64 px"
    ):
        model(torch.zeros(1, 3, 56, 56))
    with pytest.raises(DataError, match="12 x 7 .*96 x 32 or 96 x 64 px"):
        model(torch.zeros(1, 3, 96, 56))
    with pytest.raises(DataError, match="60 x 64 px cannot be cut into patches of 8 px.*64 x 64"):
        model(torch.zeros(1, 3, 60, 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(splits=()), "different positive integers"),
        (dict(splits=(2, 2)), "different positive integers"),
        (dict(splits=(2, 0)), "different positive integers"),
        (dict(splits=(4, 3)), "3 does not divide the region 4"),
        (dict(heads=5), r"num_heads=5 does not divide the width 24.*\[1, 2, 3, 4, 6, 8, 12, 24\]"),
        (dict(eval_path="fast"), "eval_path='fast' is unknown"),
        (dict(drop_path_mode="row"), "drop_path_mode='row' is unknown"),
        (dict(drop_path_rate=1.0), r"drop_path_rate=1.0 is outside \[0, 1\)"),
        (dict(arch="smal"), "Did you mean 'small'"),
        (dict(img_size=60), "img_size=60 is no multiple of patch_size=8"),
        (dict(cls_token=False, dist_token=True), "needs cls_token=True"),
        (dict(cls_token=False, skip_last_queries=True), "needs a class token"),
        (dict(depth=1, skip_last_queries=True), "and two blocks"),
        (dict(skip_last_queries=True, head_pool="mean"), "use a head with pool='cls'"),
        (dict(head_pool="max"), "pool='max' is unknown"),
        (dict(head_distilled=True, head_pool="mean"), "distilled=True reads"),
        (dict(model_accounting="paper"), "accounting='paper' is unknown"),
        (dict(model_teacher=dict(type="TimmBackbone", model_name="test_vit")), "set both or none"),
        (
            dict(
                model_teacher=dict(type="TimmBackbone", model_name="test_vit"),
                model_distillation=dict(type="DGEDistillationLoss"),
            ),
            "needs a model with two outputs",
        ),
        (
            dict(model_budget_loss=dict(type="DGEBudgetLoss", budget=0.0)),
            r"budget=0.0 is outside \(0, 1\]",
        ),
        (
            dict(model_budget_loss=dict(type="DGEBudgetLoss", budget=1.5)),
            r"budget=1.5 is outside \(0, 1\]",
        ),
        (
            dict(model_budget_loss=dict(type="DGEBudgetLoss", budget=0.5, scope="all")),
            "scope='all'",
        ),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ConfigError, match=message):
        classifier(**options)


def test_bad_calls():
    model = classifier()
    with pytest.raises(ValueError, match="mode='train' is unknown"):
        model(torch.zeros(1, 3, 64, 64), mode="train")
    with pytest.raises(DataError, match="one data sample per image"):
        model(torch.zeros(1, 3, 64, 64), mode="predict")
    with pytest.raises(DataError, match="noise has 1 entries; expected one for each of 3 blocks"):
        model.backbone(torch.zeros(1, 3, 64, 64), noise=[torch.zeros(1, 2, 2, 3)])
    no_token = classifier(cls_token=False)
    with pytest.raises(ConfigError, match=r"reads 1 extra token\(s\) but the backbone has 0"):
        no_token(torch.zeros(1, 3, 64, 64))
    plain = classifier(type="VisionTransformerBackbone")
    with pytest.raises(ConfigError, match="budget_loss needs a backbone with routers"):
        plain.loss(torch.zeros(1, 3, 64, 64), samples(soft_targets(1)))
    with pytest.raises(DataError, match="has no label"):
        model.loss(torch.zeros(1, 3, 64, 64), [type(samples(soft_targets(1))[0])(img_path="a.jpg")])
