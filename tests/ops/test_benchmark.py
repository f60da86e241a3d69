"""The operator benchmark measures what it says it measures."""

from __future__ import annotations

import pytest

from patchreg import benchmarks


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
