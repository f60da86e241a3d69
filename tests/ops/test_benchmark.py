"""The benchmarks of the operators and of a block measure what they say they measure."""

from __future__ import annotations

import pytest
import torch

from patchreg import benchmarks
from patchreg.benchmarks import roofline


def test_figures():
    figures = {row["metric"].split(" (")[0]: row for row in benchmarks.run("ops", "cpu")}
    assert list(figures) == [
        "compress",
        "compress, embedding_bag",
        "compress, index_add",
        "decompress",
        "decompress, index_select",
        "row plan",
    ]
    assert figures["compress"]["goal"] == 1.5
    assert figures["decompress"]["goal"] == 2.0
    for name in ("compress", "decompress"):
        row = figures[name]
        assert row["ratio"] == pytest.approx(row["value"] / row["baseline"])
        assert row["ok"] is (row["ratio"] <= row["goal"])


def test_roofline_counts_what_a_block_does(monkeypatch):
    for name, value in (("ROUNDS", 1), ("SPAN", 0.0)):
        monkeypatch.setattr(roofline, name, value)
    monkeypatch.setitem(roofline.COPY, "cpu", 1 << 20)
    monkeypatch.setitem(roofline.PRODUCT, "cpu", 64)
    rows = roofline.block_figures("cpu", 2, torch.float32)
    parts = {row["metric"].split(": ")[1].split(" (")[0]: row for row in rows}
    copy = 1e9 * parts["ceiling, copy"]["value"]
    product = 1e9 * parts["ceiling, matrix product"]["value"]
    # Two images of 257 tokens and 384 channels; `total` queries of both.
    dims, tokens = 384, 2 * 257
    total = parts["queries"]["flops"] / (2 * dims**2)
    assert total == int(total)
    assert 2 * (1 + 16) < total < tokens
    per_query = 2 * dims**2 + 8 * dims**2 + 2 * 257 * dims
    router = 2 * 16 * dims * 3
    expected = 2 * (total * per_query + tokens * 2 * dims**2 + router)
    assert parts["whole block"]["flops"] == expected
    dense = 2 * (tokens * 12 * dims**2 + 2 * tokens * 257 * dims)
    assert parts["block of the dense twin"]["flops"] == dense
    fused = parts["decompress, norm, region means"]
    assert fused["bytes"] == 4 * dims * (2 * total + 3 * tokens)
    for row in (fused, parts["MLP, first layer"]):
        floor = max(row["bytes"] / copy, row["flops"] / product)
        assert row["baseline"] == pytest.approx(1e3 * floor)
        assert row["ratio"] == pytest.approx(row["value"] / row["baseline"])
        assert row["limit"] == ("copy" if row is fused else row["limit"])
