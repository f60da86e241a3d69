"""A whole DGE block goes through the compiler without a graph break, on every implementation."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from patchreg.methods.dge import attention
from patchreg.methods.dge.block import DGEBlock


@pytest.mark.parametrize(
    ("path", "training"),
    [("dense", True), ("dense", False), ("sparse", True), ("sparse", False), ("front", False)],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_block_compiles_as_one_graph(device, path, training):
    # The sparse path reads its row count into Python; as a captured scalar it breaks no graph.
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = DGEBlock(24, 3, (4, 2, 1), mlp_ratio=2.0).to(device).train(training)
    for value in block.parameters():
        torch.nn.init.normal_(value, std=0.3)
    x = torch.randn(2, 65, 24, device=device, requires_grad=training)
    noise = torch.randn(2, 2, 2, 3, device=device) if training else None
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=False)
    expected, record = block(x, (8, 8), 1, path, noise)
    found, same = compiled(x, (8, 8), 1, path, noise)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(same.queries, record.queries)
    if path != "front":
        assert 2 * (1 + 4) <= record.queries.sum() < 2 * 65
    if training:
        (wanted,) = torch.autograd.grad(expected.square().sum(), x)
        (got,) = torch.autograd.grad(found.square().sum(), x)
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("path", ["sparse", "front"])
@pytest.mark.parametrize("capacity", [None, 70])
@pytest.mark.filterwarnings("ignore::UserWarning")
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_fused_evaluation_compiles_as_one_graph(device, path, capacity):
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = DGEBlock(24, 3, (4, 2, 1), mlp_ratio=2.0).to(device).eval()
    following = torch.nn.LayerNorm(24).to(device)
    for value in block.parameters():
        torch.nn.init.normal_(value, std=0.3)
    x = torch.randn(2, 65, 24, device=device)
    compiled = torch.compile(block.infer, fullgraph=True, backend="aot_eager", dynamic=False)
    arguments = (x, (8, 8), 1, path, None, following, capacity)
    with torch.no_grad():
        expected, record, prepared = block.infer(*arguments)
        found, same, again = compiled(*arguments)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(same.queries, record.queries)
    assert (prepared is None) == (path == "front") == (again is None)
    if prepared is not None:
        assert torch.allclose(again.normed, prepared.normed, atol=1e-4)
        assert torch.allclose(again.means, prepared.means, atol=1e-5)


def _every_key(query, key, value, ends_query, ends_key, longest_query, longest_key, window_size):
    """What PyTorch's kernel for CUDA computes, for any device and any number of rows."""
    assert min(window_size) >= max(longest_query, longest_key)
    rows = torch.arange(query.shape[0], dtype=torch.int32, device=query.device)
    image = torch.searchsorted(ends_query[1:].contiguous(), rows, right=True)
    keys, values = (part.unflatten(0, (-1, longest_key))[image] for part in (key, value))
    scores = torch.einsum("lhd,lmhd->lhm", query, keys) / query.shape[-1] ** 0.5
    return torch.einsum("lhm,lmhd->lhd", scores.softmax(-1), values)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_half_precision_block_with_packed_attention_compiles_as_one_graph(monkeypatch, training):
    # As on CUDA, where the rows are not known while the graph is made.
    if attention.varlen_kernel() is None:
        pytest.skip("torch before 2.10 has no attention of sequences of different lengths")
    monkeypatch.setattr(attention, "varlen_kernel", lambda: _every_key)
    monkeypatch.setattr(attention, "_varlen_lack", lambda query: "")
    monkeypatch.setattr(attention, "_fastest", lambda *arguments: "varlen")
    torch._dynamo.reset()
    block = DGEBlock(24, 3, (4, 2, 1), mlp_ratio=2.0).bfloat16().train(training)
    for value in block.parameters():
        torch.nn.init.normal_(value, std=0.3)
    x = torch.randn(2, 65, 24, dtype=torch.bfloat16)
    noise = torch.randn(2, 2, 2, 3) if training else None
    expected, record = block(x, (8, 8), 1, "sparse", noise)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=False)
    found, same = compiled(x, (8, 8), 1, "sparse", noise)
    assert torch.equal(same.queries, record.queries)
    assert torch.allclose(found, expected, rtol=0.02, atol=0.02)
