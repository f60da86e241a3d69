"""What only a GPU can show: no host sync, graph capture, other streams, repeatable sums."""

from __future__ import annotations

import patchreg_ops as ops
import pytest
import torch

SPLITS, GRID = (4, 2, 1), (16, 16, 1)
compiled = pytest.mark.parametrize(
    "device", [pytest.param("compiled-cuda", marks=pytest.mark.gpu)], indirect=True
)


def inputs(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(3, (8, 4, 4), generator=generator)
    x = torch.randn(8, 257, 64, generator=generator)
    gate = torch.randn(8, 4, 4, 3, generator=generator)
    total = int(ops.row_lengths(choice, SPLITS, *GRID).sum())
    return choice.to(device), x.to(device, dtype), gate.to(device, dtype), total


def sparse(choice, x, total):
    plan = ops.row_plan(choice, SPLITS, *GRID, total=total)
    return ops.decompress(ops.compress(x, plan, *GRID).sin(), plan, x)


def dense(x, gate):
    update = ops.compress_dense(x, SPLITS, *GRID).sin()
    return ops.decompress_dense(update, gate, SPLITS, *GRID, reference=x)


def fused(x, logits, capacity):
    """A block of fused operators whose shapes do not depend on the choice."""
    weight, bias = torch.linspace(0.5, 1.5, 128, device=x.device, dtype=x.dtype).view(2, 64)
    choice, _ = ops.route(logits, SPLITS, *GRID)
    plan = ops.row_plan(choice, SPLITS, *GRID, total=capacity, padded=True)
    pooled, normed = ops.compress_norm(x, plan, weight, bias, 1e-6)
    update = ops.sum_norm(pooled, normed, weight, bias, 1e-6)
    out = ops.decompress_norm(update, normed, plan, x, weight, bias, 1e-6, 4)
    return (*out, plan.starts)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_without_sync_and_captured(device, dtype):
    _, x, gate, total = inputs(device, dtype)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused(x, gate, total + 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = fused(x, gate, 8 * 257)
    gate.copy_(gate.flip(0))
    x.copy_(x.flip(0) * 2)
    graph.replay()
    for left, right in zip(outs, fused(x, gate, 8 * 257), strict=True):
        assert torch.equal(left, right)


@compiled
def test_too_small_a_capacity_stays_in_memory(device):
    _, x, gate, total = inputs(device)
    *out, starts = fused(x, gate, 40)
    torch.cuda.synchronize()
    assert total > 40
    assert int(starts[-1]) == 40
    assert all(value.isfinite().all() for value in out)


@compiled
def test_no_host_sync(device):
    choice, x, gate, total = inputs(device)
    x.requires_grad_()
    gate.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.row_lengths(choice, SPLITS, *GRID)
        sparse(choice, x, total).sum().backward()
        dense(x, gate).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@compiled
def test_graph_capture(device):
    choice, x, gate, total = inputs(device)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            sparse(choice, x, total)
            dense(x, gate)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = sparse(choice, x, total), dense(x, gate)
        choice.copy_(choice.flip(0))
        x.copy_(x.flip(0) * 2)
        graph.replay()
        assert torch.equal(outs[0], sparse(choice, x, total))
        assert torch.equal(outs[1], dense(x, gate))


@compiled
def test_other_stream_gives_the_same_bits(device):
    choice, x, gate, total = inputs(device, torch.bfloat16)
    expected = sparse(choice, x, total), dense(x, gate)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        with torch.cuda.stream(stream):
            actual = sparse(choice, x, total), dense(x, gate)
        stream.synchronize()
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


@compiled
def test_gradients_repeat_to_the_bit(device):
    choice, x, gate, total = inputs(device)
    x.requires_grad_()
    gate.requires_grad_()
    runs = []
    for _ in range(2):
        gx = torch.autograd.grad(sparse(choice, x, total).square().sum(), x)
        runs.append(gx + torch.autograd.grad(dense(x, gate).square().sum(), (x, gate)))
    for left, right in zip(*runs, strict=True):
        assert torch.equal(left, right)
