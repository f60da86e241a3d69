"""Region sampling operators of the Dynamic Grained Encoder, for CPU and CUDA, needing torch only.

`build_info()` tells which implementation runs; README.md in this folder has semantics, shapes and
the way to add an operator.
"""

from __future__ import annotations

from ._library import build_info
from .region_sample import (
    RowPlan,
    compress,
    compress_dense,
    decompress,
    decompress_dense,
    dense_row_plan,
    region_grid,
    row_lengths,
    row_plan,
)

__all__ = [
    "RowPlan",
    "build_info",
    "compress",
    "compress_dense",
    "decompress",
    "decompress_dense",
    "dense_row_plan",
    "region_grid",
    "row_lengths",
    "row_plan",
]
