"""Fused norms against the composition they replace, on random shapes, types and cut-off grids."""

from __future__ import annotations

import random

import patchreg_ops as ops
import pytest
import torch
import torch.nn.functional as F

# Relative to the largest value; half precision may differ by one rounding before the norm.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    if found.numel():
        error = (found.double() - expected.double()).abs().max().item()
        assert error <= tolerance * max(1.0, expected.double().abs().max().item())


def region_means(x, height, width, extra, region):
    """Mean of every region, with numpy-like loops."""
    cells = x[:, extra:].unflatten(1, (height, width))
    rows = [
        torch.stack(
            [
                cells[:, y : y + region, x : x + region].mean((1, 2))
                for x in range(0, width, region)
            ],
            dim=1,
        )
        for y in range(0, height, region)
    ]
    return torch.stack(rows, dim=1)


def check(batch, height, width, extra, splits, channels, dtype, seed, device):
    generator = torch.Generator().manual_seed(seed)
    grid, region, tolerance = (height, width, extra), max(splits), TOLERANCE[dtype]
    shape = (batch, *ops.region_grid(height, width, region))
    choice = torch.randint(len(splits), shape, generator=generator).to(device)
    plan = ops.row_plan(choice, splits, *grid)
    count = len(plan.rows)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    x, first, second = (
        randn(batch, extra + height * width, channels),
        randn(count, channels),
        randn(count, channels),
    )
    weight, bias, eps = randn(channels), randn(channels), 1e-6

    def norm(values):
        wide = values.double()
        return F.layer_norm(wide, (channels,), weight.double(), bias.double(), eps)

    pooled, normed = ops.compress_norm(x, plan, weight, bias, eps)
    assert torch.equal(pooled, ops.compress(x, plan, *grid))
    close(normed, norm(pooled), tolerance)

    found = ops.sum_norm(first, second, weight, bias, eps)
    assert found.dtype == dtype
    close(found, norm(first + second), tolerance)

    out, normed, means = ops.decompress_norm(
        first, second, plan, x, weight, bias, eps, region=region
    )
    expected = x.double()
    if count:
        expected = ops.decompress(first.double() + second.double(), plan, expected)
    close(out, expected, tolerance)
    assert out.dtype == normed.dtype == dtype
    close(normed, norm(out), tolerance)
    assert means.dtype == (torch.float32 if dtype.itemsize < 4 else dtype)
    close(means, region_means(out.double(), height, width, extra, region), min(tolerance, 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels", [64, 384, 385, 768, 1100])
def test_widths(channels, dtype, device):
    check(2, 8, 12, 1, (4, 2, 1), channels, dtype, channels, device)


def test_random_shapes(device):
    rng = random.Random(5)
    for seed in range(120):
        side = rng.choice([1, 2, 4, 4, 6])
        divisors = [d for d in range(1, side) if side % d == 0]
        splits = [side, *rng.sample(divisors, rng.randint(0, min(2, len(divisors))))]
        check(
            rng.randint(0, 3),
            rng.randint(1, 11),
            rng.randint(1, 11),
            rng.randint(0, 2),
            tuple(splits),
            # Of few channels, nearly equal ones make a norm that amplifies roundings.
            rng.choice([8, 16, 19, 72] if seed % 2 else [2, 3]),
            torch.float32 if seed % 2 else torch.float64,
            seed,
            device,
        )


def test_hand_written(device):
    """One region of 2 x 2, coarse: four tokens share one update."""
    plan = ops.row_plan(torch.ones(1, 1, 1, dtype=torch.int64, device=device), (2, 1), 2, 2, 0)
    x = torch.tensor([[[0.0, 4.0], [1.0, 1.0], [3.0, 5.0], [0.0, 2.0]]], device=device)
    weight, bias = torch.tensor([2.0, 1.0], device=device), torch.tensor([0.5, 0.0], device=device)
    pooled, normed = ops.compress_norm(x, plan, weight, bias, 0.0)
    assert pooled.tolist() == [[1.0, 3.0]]
    assert normed.tolist() == [[-1.5, 1.0]]
    first, second = torch.tensor([[[1.0, 0.0]], [[0.0, -1.0]]], device=device)
    out, normed, means = ops.decompress_norm(first, second, plan, x, weight, bias, 0.0, 2)
    assert out.tolist() == [[[1.0, 3.0], [2.0, 0.0], [4.0, 4.0], [1.0, 1.0]]]
    assert normed[0, :2].tolist() == [[-1.5, 1.0], [2.5, -1.0]]
    assert means.tolist() == [[[[2.0, 2.0]]]]


def test_non_contiguous(device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 17, 2, generator=generator).to(device).permute(2, 1, 0)
    plan = ops.row_plan(torch.zeros(2, 1, 1, dtype=torch.int64, device=device), (4,), 4, 4, 1)
    update = torch.randn(24, 34, generator=generator).to(device).T
    weight, bias = torch.randn(2, 48, generator=generator).to(device)[:, ::2]
    packed = (x.contiguous(), weight.contiguous(), bias.contiguous())
    for found, expected in zip(
        ops.decompress_norm(update, update, plan, x, weight, bias, 1e-6, 4),
        ops.decompress_norm(update.contiguous(), update.contiguous(), plan, *packed, 1e-6, 4),
        strict=True,
    ):
        assert torch.equal(found, expected)
    assert torch.equal(
        ops.compress_norm(x, plan, weight, bias, 1e-6)[1],
        ops.compress_norm(packed[0], plan, *packed[1:], 1e-6)[1],
    )
    assert torch.equal(
        ops.sum_norm(x, x, weight, bias, 1e-6),
        ops.sum_norm(packed[0], packed[0], *packed[1:], 1e-6),
    )


def test_bad_arguments():
    plan = ops.row_plan(torch.zeros(2, 2, 2, dtype=torch.int64), (4, 2, 1), 8, 8, 1)
    x, update, weight = torch.zeros(2, 65, 3), torch.zeros(130, 3), torch.ones(3)

    def decompress(**changes):
        arguments = dict(
            first=update, second=update, plan=plan, reference=x, weight=weight, bias=weight
        )
        return ops.decompress_norm(**(arguments | changes), eps=1e-6, region=4)

    with pytest.raises(ValueError, match=r"first has shape \(3, 3\); expected \[L, C\]"):
        decompress(first=update[:3])
    with pytest.raises(ValueError, match="reference has 1 images of 65 tokens, the plan 2 of 65"):
        decompress(reference=x[:1])
    with pytest.raises(TypeError, match="second is torch.float64, the tokens is torch.float32"):
        decompress(second=update.double())
    with pytest.raises(ValueError, match=r"weight has shape \(2,\); the norm of 3 channels"):
        decompress(weight=weight[:2])
    with pytest.raises(ValueError, match="region is 0"):
        ops.decompress_norm(update, update, plan, x, weight, weight, 1e-6, 0)
    with pytest.raises(ValueError, match="for inference, but a tensor requires a gradient"):
        decompress(bias=weight.clone().requires_grad_())
    with pytest.raises(ValueError, match="for inference"):
        ops.compress_norm(x.requires_grad_(), plan, weight, weight, 1e-6)
    with torch.no_grad():
        ops.compress_norm(x, plan, weight, weight, 1e-6)
    x = x.detach()
    with pytest.raises(ValueError, match=r"update has shape \(129, 3\), x \(130, 3\)"):
        ops.sum_norm(update, update[1:], weight, weight, 1e-6)
    with pytest.raises(TypeError, match="x is torch.int64; expected a float"):
        ops.sum_norm(update.long(), update.long(), weight, weight, 1e-6)
    with pytest.raises(ValueError, match="bias is on meta, the tokens on cpu"):
        ops.sum_norm(update, update, weight, weight.to("meta"), 1e-6)
