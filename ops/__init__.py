"""Region sampling operators of the Dynamic Grained Encoder, for CPU and CUDA, needing torch only.

`build_info()` tells which implementation runs; README.md in this folder has semantics, shapes and
the way to add an operator.
"""

from __future__ import annotations

from ._library import build_info
from .bilinear import bilinear_channelwise, bilinear_pointwise, bilinear_pointwise_packed
from .fused import compress_norm, decompress_norm, sum_norm
from .ragged import packed_attend, ragged_attention, ragged_matmul
from .region_sample import (
    RowPlan,
    compress,
    compress_dense,
    decompress,
    decompress_dense,
    dense_row_plan,
    region_grid,
    route,
    row_lengths,
    row_plan,
)

__all__ = [
    "RowPlan",
    "bilinear_channelwise",
    "bilinear_pointwise",
    "bilinear_pointwise_packed",
    "build_info",
    "compress",
    "compress_dense",
    "compress_norm",
    "decompress",
    "decompress_dense",
    "decompress_norm",
    "dense_row_plan",
    "packed_attend",
    "ragged_attention",
    "ragged_matmul",
    "region_grid",
    "route",
    "row_lengths",
    "row_plan",
    "sum_norm",
]
