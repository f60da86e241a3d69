"""Fused evaluation of DGE: the numbers of the plain operators, also at a fixed capacity and from a graph."""

from __future__ import annotations

import logging

import pytest
import torch

from patchreg.methods.dge import graph
from patchreg.methods.dge.block import DGEBlock
from patchreg.methods.dge.graph import DGEGraphRunner
from patchreg.methods.dge.model import DGEClassifier
from patchreg.registry import MODELS
from patchreg.utils.errors import ConfigError

ARCH = dict(embed_dims=24, depth=4, num_heads=3)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def backbone(dtype=torch.float64, **changes):
    """A small backbone whose routers choose every candidate."""
    settings = dict(type="DGEVisionTransformerBackbone", arch=ARCH, img_size=64, patch_size=8)
    settings |= changes
    torch.manual_seed(0)
    model = MODELS.build(settings).to(dtype).eval()
    for name, value in model.named_parameters():
        if "router" in name and name.endswith("weight"):
            torch.nn.init.normal_(value, std=2.0)
        elif "norm" not in name:
            torch.nn.init.normal_(value, std=0.2)
    return model


def images(count=3, side=64, dtype=torch.float64):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)


def plain(monkeypatch, model, inputs, **kwargs):
    """What the model returns without fused operators."""
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(DGEBlock, "fuses", lambda self, x: False)
        return model(inputs, **kwargs)


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(skip_last_queries=True, dist_token=True),
        dict(cls_token=False, splits=(1, 2)),
        dict(img_size=56, region_padding=True, attention_backend="padded"),
    ],
    ids=["plain", "front", "no extra", "cut off"],
)
def test_fused_equals_plain(changes, dtype, monkeypatch):
    model = backbone(dtype=dtype, **changes)
    inputs = images(side=changes.get("img_size", 64), dtype=dtype)
    expected = plain(monkeypatch, model, inputs, out_blocks=(0, 2))
    with torch.no_grad():
        found = model(inputs, out_blocks=(0, 2))
    choices = [block.choice for block in expected.routing.routed]
    assert len({int(value) for choice in choices for value in choice.flatten()}) == len(
        model.splits
    )
    for left, right in zip(found.routing.routed, expected.routing.routed, strict=True):
        assert torch.equal(left.choice, right.choice)
    close(found.tokens, expected.tokens, TOLERANCE[dtype])
    for left, right in zip(found.blocks, expected.blocks, strict=True):
        close(left, right, TOLERANCE[dtype])
    assert torch.equal(found.macs, expected.macs)
    assert found.dense_macs == expected.dense_macs


def test_fused_pyramid_equals_plain(monkeypatch):
    sizes = dict(
        depths=(2, 1, 2, 2),
        embed_dims=(8, 12, 16, 24),
        num_heads=(1, 2, 2, 3),
        mlp_ratios=(2, 2, 2, 2),
        sr_ratios=(8, 4, 2, 1),
    )
    for changes in (dict(skip_last_queries=True), dict(out_indices=(0, 3))):
        settings = dict(type="DGEPyramidVisionTransformerBackbone", arch=sizes, img_size=128)
        torch.manual_seed(0)
        model = MODELS.build(settings | changes).double().eval()
        for name, value in model.named_parameters():
            if "router" in name and name.endswith("weight"):
                torch.nn.init.normal_(value, std=2.0)
        inputs = images(2, 128)
        expected = plain(monkeypatch, model, inputs)
        with torch.no_grad():
            found = model(inputs)
        close(found.tokens, expected.tokens, 1e-12)
        for left, right in zip(found.maps, expected.maps, strict=True):
            close(left, right, 1e-12)
        assert torch.equal(found.macs, expected.macs)


def test_gradients_take_the_plain_way():
    model = backbone()
    inputs = images()
    with torch.no_grad():
        expected = model(inputs).tokens
    found = model(inputs).tokens
    assert found.requires_grad
    close(found.detach(), expected, 1e-12)
    found.square().sum().backward()
    assert model.blocks[0].mlp.fc1.weight.grad.abs().max() > 0


@pytest.mark.parametrize("trained", ["blocks.2.mlp.fc1", "blocks.3.norm1", "norm"])
def test_one_trained_part_takes_the_plain_way(trained):
    """Evaluation mode with gradients of some parameters only, as when the others are frozen."""
    model = backbone()
    inputs = images()
    expected = model(inputs).tokens.detach()
    model.requires_grad_(False)
    part = model.get_submodule(trained).requires_grad_()
    found = model(inputs).tokens
    close(found.detach(), expected, 1e-12)
    found.square().sum().backward()
    assert part.weight.grad.abs().max() > 0
    part.requires_grad_(False)
    assert not model(inputs).tokens.requires_grad


def test_autocast_takes_the_plain_way():
    model = backbone(dtype=torch.float32)
    inputs = images(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not model.blocks[0].fuses(inputs)
        assert model(inputs).tokens.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "padded", "per_image"])
@pytest.mark.parametrize("spare", [0, 5, 200])
def test_fixed_capacity(backend, spare):
    """Spare rows change nothing; attention pads, whatever the back-end."""
    model = backbone(attention_backend=backend, skip_last_queries=True)
    inputs = images()
    with torch.no_grad():
        expected = model(inputs)
        rows = [int(block.queries.sum()) for block in expected.routing.routed]
        model.row_capacity = max(rows) + spare
        found = model(inputs)
    close(found.tokens, expected.tokens, 1e-12)
    assert torch.equal(found.macs, expected.macs)


class EagerCapture(graph._Captured):
    """Stands in for a graph where there is no GPU: repeats the pass with the fixed capacity."""

    def __init__(self, forward, images, capacity, shifts):
        self.capacity, self.shifts = capacity, shifts
        self.outgrown, self.most = False, 0
        self.forward = forward
        self.backbone = forward.__self__.backbone

    def replay(self, images):
        self.backbone.row_capacity = self.capacity
        try:
            return self.forward(images)
        finally:
            self.backbone.row_capacity = None


@pytest.fixture
def captured(monkeypatch):
    monkeypatch.setattr(graph, "_Captured", EagerCapture)
    monkeypatch.setattr(DGEGraphRunner, "_can_capture", lambda self, images: True)


def check_runner(runner, inputs, dtype=torch.float64):
    with torch.no_grad():
        expected = runner.backbone(inputs)
    found = runner(inputs)
    close(found.output, expected.tokens, TOLERANCE.get(dtype, 3e-2))
    assert torch.equal(found.macs, expected.macs)
    rows = [int(block.queries.sum()) for block in expected.routing.routed]
    assert found.rows.tolist() == rows
    return max(rows)


def test_runner_captures_replays_and_grows(captured, caplog, monkeypatch):
    monkeypatch.setattr(graph, "ROWS", 1)
    model = backbone()
    runner = DGEGraphRunner(model, margin=0.0)
    inputs = images()
    most = check_runner(runner, inputs)
    assert (runner.captures, runner.eager) == (1, 1)
    (held,) = runner._graphs.values()
    assert held.capacity == most
    check_runner(runner, inputs.flip(0))
    assert (runner.captures, runner.eager) == (1, 1)
    for block in model.blocks:  # Every region fine: more rows than the graph holds.
        block.dge.shift(float("inf"))
    runner._graphs[next(iter(runner._graphs))].shifts = [
        block.dge.router.offset for block in model.blocks
    ]
    with caplog.at_level(logging.INFO):
        assert check_runner(runner, inputs) == 3 * 65
    assert (runner.captures, runner.eager) == (1, 2)
    check_runner(runner, inputs)
    assert (runner.captures, runner.eager) == (2, 3)
    check_runner(runner, inputs)
    assert (runner.captures, runner.eager) == (2, 3)
    (held,) = runner._graphs.values()
    assert held.capacity == 3 * 65
    assert "needs 195 rows, more than the captured" in " ".join(sorted(runner._told))


def test_runner_captures_anew_after_a_shift_and_for_other_sizes(captured):
    model = backbone()
    runner = DGEGraphRunner(model)
    check_runner(runner, images())
    check_runner(runner, images(2))
    assert runner.captures == 2
    for block in model.blocks:
        block.dge.shift(-float("inf"))
    check_runner(runner, images())
    assert runner.captures == 3
    assert next(iter(runner._graphs.values())).capacity <= 3 * 65


def test_runner_of_a_classifier(captured):
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type="DGEClassifier",
            backbone=dict(
                type="DGEVisionTransformerBackbone", arch=ARCH, img_size=64, patch_size=8
            ),
            head=dict(type="LinearHead", num_classes=5, in_channels=24),
        )
    ).eval()
    assert isinstance(model, DGEClassifier)
    runner = DGEGraphRunner(model)
    inputs = images(dtype=torch.float32)
    with torch.no_grad():
        expected = model(inputs)
        macs, _ = model.cost(model.extract(inputs))
    for _ in range(2):
        found = runner(inputs)
        close(found.output, expected, 1e-5)
        assert torch.equal(found.macs, macs)
    assert (runner.captures, runner.eager) == (1, 1)


def test_runner_without_a_gpu_says_so():
    runner = DGEGraphRunner(backbone())
    for _ in range(2):
        check_runner(runner, images())
    assert (runner.captures, runner.eager) == (0, 2)
    (told,) = runner._told
    assert told.startswith("a graph needs CUDA")
    assert told.endswith("torch.float64 on cpu: batches run eagerly")


def test_runner_refuses_in_words():
    with pytest.raises(ConfigError, match="a Linear has no fixed row capacity"):
        DGEGraphRunner(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="margin=-1"):
        DGEGraphRunner(backbone(), margin=-1)
    runner = DGEGraphRunner(backbone().train())
    with pytest.raises(ConfigError, match=r"call model.eval\(\)"):
        runner(images())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fused_equals_plain_on_a_gpu(dtype, monkeypatch):
    model = backbone(dtype=dtype, skip_last_queries=True, arch=dict(ARCH, num_heads=1)).cuda()
    inputs = images(dtype=dtype).cuda()
    expected = plain(monkeypatch, model, inputs)
    with torch.no_grad():
        found = model(inputs)
    if dtype == torch.bfloat16:  # Choices of nearly equal candidates may differ.
        assert (found.tokens - expected.tokens).abs().mean() <= 0.1
    else:
        close(found.tokens, expected.tokens, TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_graph_equals_eager(dtype, monkeypatch):
    monkeypatch.setattr(graph, "ROWS", 1)
    model = backbone(dtype=dtype, skip_last_queries=True).cuda()
    runner = DGEGraphRunner(model, margin=0.3)
    inputs = images(8, dtype=dtype).cuda()
    for step in range(4):
        check_runner(runner, inputs.roll(step, 0), dtype)
    assert runner.captures == 1
    assert runner.eager == 1
    with torch.no_grad():  # Weights that change in place are seen.
        model.blocks[0].mlp.fc2.weight.mul_(1.01)
    check_runner(runner, inputs, dtype)
    # A batch of images that need more rows: eager first, then captured anew.
    for block in model.blocks:
        block.dge.shift(float("inf"))
    check_runner(runner, inputs, dtype)
    check_runner(runner, inputs, dtype)
    assert runner.captures == 2


@pytest.mark.gpu
def test_graph_in_half_precision():
    model = backbone(dtype=torch.bfloat16, arch=dict(ARCH, embed_dims=64, num_heads=2)).cuda()
    runner = DGEGraphRunner(model)
    inputs = images(8, dtype=torch.bfloat16).cuda()
    first = runner(inputs)
    assert torch.equal(first.macs, runner(inputs).macs)
    # Rows that fill up the capacity meet memory that was never written, and nothing of it returns.
    for _ in range(3):
        found = runner(inputs)
        assert found.output.isfinite().all()
        assert (found.output - first.output).abs().max() <= 0.1 * first.output.abs().max()
    assert runner.captures == 1


@pytest.mark.gpu
def test_fused_evaluation_waits_for_the_device_once_per_block():
    """Only the row counts of the blocks are waited for, by events and not by the device."""
    model = backbone(dtype=torch.float32).cuda()
    inputs = images(dtype=torch.float32).cuda()
    with torch.no_grad():
        model(inputs)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
