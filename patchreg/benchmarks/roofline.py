"""Roofline of a DGE block: bytes, FLOPs and time of every stage beside the ceilings of this machine.

DeiT-S at 256 px, evaluation, one routed block with 125 of 257 queries on the mean. The ceilings are
measured first: a copy (bytes read and written) and a square matrix product in the same type. A stage
cannot take less than max(bytes / copy, FLOPs / product); its share is that time over its own. Every
stage is repeated alone, so small ones find their operands in the caches, and shares above 1 are caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from patchreg_ops import compress_norm, decompress_norm, route, row_plan, sum_norm
from torch import Tensor

from patchreg.benchmarks import figure, interleave
from patchreg.benchmarks.dge import GRID, build, seed_gates
from patchreg.methods.dge.attention import PackedRows, packed_attention

# (images, type)
CASES = {
    "cpu": ((8, torch.float32), (1, torch.float32)),
    "cuda": ((256, torch.bfloat16), (32, torch.bfloat16)),
}
ROUNDS = 9
SPAN = 0.01  # seconds that a call is repeated for in a round
COPY = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes
PRODUCT = {"cpu": 1536, "cuda": 8192}  # side


@dataclass(frozen=True)
class Stage:
    """One step of a block.

    Args:
        name: What it does.
        call: Runs it once.
        moved: Bytes that it reads and writes at least.
        flops: Floating point operations (two per multiply-accumulate).
    """

    name: str
    call: Callable[[], Any]
    moved: float
    flops: float = 0.0


def measure(calls: list[Callable[[], Any]], device: str, rounds: int = ROUNDS) -> list[float]:
    """Return the median seconds of each call, measured in turn.

    Args:
        calls: What to time.
        device: `cpu` (CPU time) or `cuda` (wall clock, each call with all work done).
        rounds: Rounds.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter

    def repeated(call: Callable[[], Any], count: int) -> Callable[[], None]:
        def run_all() -> None:
            for _ in range(count):
                call()
            if device == "cuda":
                torch.cuda.synchronize()

        return run_all

    counts = []
    for call in calls:
        call()
        (alone,) = interleave([repeated(call, 1)], 3, clock)
        counts.append(max(1, min(500, round(SPAN / max(min(alone), 1e-6)))))
    seconds = interleave([repeated(*pair) for pair in zip(calls, counts)], rounds, clock)
    return [statistics.median(times) / count for times, count in zip(seconds, counts)]


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Measure what this machine can do at best: bytes per second and FLOPs per second.

    Args:
        device: `cpu` or `cuda`.
        dtype: Type of the matrix product.
    """
    source = torch.ones(COPY[device] // 4, device=device)
    target = torch.empty_like(source)
    side = PRODUCT[device]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
    out = torch.empty_like(left)
    copy, product = measure(
        [lambda: target.copy_(source), lambda: torch.mm(left, right, out=out)], device, rounds=5
    )
    return 2 * source.nbytes / copy, 2 * side**3 / product


def stages(block: Any, x: Tensor, grid: tuple[int, int]) -> list[Stage]:
    """Take a block apart into the steps of its fused evaluation.

    Args:
        block: `DGEBlock` in evaluation.
        x: Tokens with one extra token.
        grid: Token grid (H, W).

    Shape:
        x [B, N, C].
    """
    splits, region = block.dge.candidates, block.dge.region
    geometry = (splits, *grid, 1)
    norm1, norm2, attn, mlp = block.norm1, block.norm2, block.attn, block.mlp
    normed = norm1(x)
    means = torch.zeros(len(x), grid[0] // region, grid[1] // region, x.shape[2]).to(x)
    logits = block.dge.router(means)
    choice, lengths = route(logits, *geometry)
    counts = lengths.tolist()
    total = sum(counts)
    plan = row_plan(choice, *geometry, total=total)
    rows = PackedRows(plan, counts, max(counts))
    key, value = attn.keys(normed, grid)
    pooled, queries = compress_norm(x, plan, norm1.weight, norm1.bias, norm1.eps)
    heads = attn.q(queries).unflatten(-1, (attn.num_heads, -1))
    attended = torch.zeros_like(pooled)
    hidden = mlp.fc1(queries)

    size, dims = x.element_size(), x.shape[2]
    tokens, width = x.shape[0] * x.shape[1], mlp.fc1.out_features
    wide, packed = tokens * dims * size, total * dims * size

    def linear(name: str, layer: Any, value: Tensor) -> Stage:
        count = value.numel() // value.shape[-1]
        inner, outer = layer.in_features, layer.out_features
        moved = (count * (inner + outer) + inner * outer) * size
        return Stage(name, lambda: layer(value), moved, 2.0 * count * inner * outer)

    def attention() -> Tensor:
        return packed_attention(heads, key, value, rows, attn.backend)

    return [
        Stage(
            "router and choice",
            lambda: route(block.dge.router(means), *geometry),
            means.nbytes,
            2.0 * means.numel() * len(splits),
        ),
        linear("keys and values", attn.kv, normed),
        Stage(
            "row plan",
            lambda: row_plan(choice, *geometry, total=total),
            8.0 * (4 * total + tokens),
        ),
        Stage(
            "compress, norm",
            lambda: compress_norm(x, plan, norm1.weight, norm1.bias, norm1.eps),
            wide + 2 * packed,
        ),
        linear("queries", attn.q, queries),
        Stage("attention", attention, 2 * packed + 2 * wide, 4.0 * total * x.shape[1] * dims),
        linear("projection", attn.proj, queries),
        Stage(
            "sum, norm",
            lambda: sum_norm(pooled, attended, norm2.weight, norm2.bias, norm2.eps),
            3 * packed,
        ),
        linear("MLP, first layer", mlp.fc1, queries),
        Stage("GELU", lambda: F.gelu(hidden), 2.0 * total * width * size),
        linear("MLP, second layer", mlp.fc2, hidden),
        Stage(
            "decompress, norm, region means",
            lambda: decompress_norm(
                attended, pooled, plan, x, norm1.weight, norm1.bias, norm1.eps, region
            ),
            2 * packed + 3 * wide,
        ),
    ]


@torch.no_grad()
def block_figures(device: str, batch: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Measure the stages of one block, the whole block and the block of the dense twin.

    Args:
        device: `cpu` or `cuda`.
        batch: Images.
        dtype: Type of weights and tokens.
    """
    backbone = build("DGEVisionTransformerBackbone").to(device, dtype).eval()
    seed_gates(backbone, batch)
    twin = build("VisionTransformerBackbone").to(device, dtype).eval()
    block, plain = backbone.blocks[0], twin.blocks[0]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 257, backbone.embed_dims, generator=generator).to(device, dtype)
    parts = stages(block, x, GRID)
    prepared = block.infer(x, GRID, 1, following=block.norm1)[2]
    flops = sum(part.flops for part in parts)
    full = 2.0 * batch * (257 * 12 * x.shape[2] ** 2 + 2 * 257**2 * x.shape[2])
    weights = sum(value.nbytes for value in plain.parameters())
    parts += [
        Stage(
            "whole block",
            lambda: block.infer(x, GRID, 1, "sparse", prepared, block.norm1),
            sum(part.moved for part in parts),
            flops,
        ),
        # Tokens in and out; everything between them might stay in a cache.
        Stage("block of the dense twin", lambda: plain(x), 2.0 * x.nbytes + weights, full),
    ]
    copy, product = ceilings(device, dtype)
    seconds = measure([part.call for part in parts], device)
    name = f"B={batch} {str(dtype).split('.')[1]}"
    found = [
        figure(f"{name}: ceiling, copy", copy / 1e9, "GB/s"),
        figure(f"{name}: ceiling, matrix product", product / 1e9, "GFLOP/s"),
    ]
    for part, taken in zip(parts, seconds):
        by_bytes, by_flops = part.moved / copy, part.flops / product
        limit = "matrix product" if by_flops > by_bytes else "copy"
        least = max(by_bytes, by_flops)
        work = f"{part.moved / 1e6:.2f} MB, {part.flops / 1e9:.3f} GFLOP"
        row = figure(
            f"{name}: {part.name} ({work}: {least / taken:.0%} of {limit})",
            1e3 * taken,
            "ms",
            1e3 * least,
            taken / least,
        )
        found.append(row | dict(bytes=part.moved, flops=part.flops, limit=limit))
    return found


def run(device: str) -> list[dict[str, Any]]:
    """Measure a block at the batch sizes of the `dge` benchmark.

    Args:
        device: `cpu` (one thread, CPU time) or `cuda` (wall clock).

    Returns:
        Figures of `patchreg.benchmarks`: the time of a stage, the least time that the ceilings
        allow as `baseline`, and `ratio`, how many times that it takes; besides `bytes`, `flops`
        and which ceiling is the `limit`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for case in CASES[device] for row in block_figures(device, *case)]
    finally:
        torch.set_num_threads(threads)
