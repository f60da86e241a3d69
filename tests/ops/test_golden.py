"""Region sampling against the golden values of the official kernels."""

from __future__ import annotations

import patchreg_ops as ops
import pytest
import torch
from golden_reader import load

CASES = ("a", "b", "c", "d")


def case(name, device):
    data = {key: value.to(device) for key, value in load("dge", "ops_grained").group(name).items()}
    splits = tuple(data["splits"].tolist())
    if "geom" in data:
        region, *grid = data["geom"].tolist()
        assert region == max(splits)
    else:
        grid = [8, 8, 1]
    return data, splits, grid


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.fixture(
    params=[(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-4)], ids=["f64", "f32"]
)
def precision(request):
    return request.param


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_total", [False, True])
def test_plan(name, with_total, device):
    data, splits, grid = case(name, device)
    total = len(data["patches"]) if with_total else None
    plan = ops.row_plan(data["indices"], splits, *grid, total=total)
    assert torch.equal(plan.rows, data["patches"])
    assert torch.equal(plan.lengths, data["batch_lengths"])
    assert torch.equal(plan.owner, data["owner"])
    assert torch.equal(ops.row_lengths(data["indices"], splits, *grid), data["batch_lengths"])
    assert plan.rows.dtype == plan.lengths.dtype == plan.owner.dtype == torch.int64


@pytest.mark.parametrize("name", CASES)
def test_dense_plan(name, device):
    data, splits, grid = case(name, device)
    plan = ops.dense_row_plan(len(data["x"]), splits, *grid, device=device)
    assert torch.equal(plan.rows, data["dense_patches"])
    assert torch.equal(plan.lengths, data["dense_lengths"])
    assert plan.owner is None


@pytest.mark.parametrize("name", CASES)
def test_packed(name, precision, device):
    dtype, tolerance, grad_tolerance = precision
    data, splits, grid = case(name, device)
    plan = ops.row_plan(data["indices"], splits, *grid)
    x = data["x"].to(dtype).requires_grad_()
    comp = ops.compress(x, plan, *grid)
    close(comp, data["comp"], tolerance)
    (gx,) = torch.autograd.grad(comp, x, data["g_comp"].to(dtype))
    close(gx, data["gx_compress"], grad_tolerance)

    update = data["upd"].to(dtype).requires_grad_()
    close(ops.decompress(update, plan), data["out_noadd"], tolerance)
    out = ops.decompress(update, plan, x)
    close(out, data["out_add"], tolerance)
    cotangent = data["g_out"].to(dtype)
    before = cotangent.clone()
    gupdate, greference = torch.autograd.grad(out, (update, x), cotangent)
    close(gupdate, data["gupd"], grad_tolerance)
    assert torch.equal(greference, before)
    assert torch.equal(cotangent, before)


@pytest.mark.parametrize("name", CASES)
def test_dense(name, precision, device):
    dtype, tolerance, grad_tolerance = precision
    data, splits, grid = case(name, device)
    x = data["x"].to(dtype).requires_grad_()
    batch, _, channels = x.shape
    comp = ops.compress_dense(x, splits, *grid)
    close(comp.flatten(0, 1), data["comp_dense"], tolerance)
    (gx,) = torch.autograd.grad(comp.flatten(0, 1), x, data["g_comp_dense"].to(dtype))
    close(gx, data["gx_dense"], grad_tolerance)

    update = data["upd_dense"].to(dtype).view(batch, -1, channels).requires_grad_()
    gate = data["gate"].to(dtype).requires_grad_()
    out = ops.decompress_dense(update, gate, splits, *grid, reference=x)
    close(out, data["out_dense"], tolerance)
    cotangent = data["g_out"].to(dtype)
    gupdate, ggate, greference = torch.autograd.grad(out, (update, gate, x), cotangent)
    close(gupdate.flatten(0, 1), data["gupd_dense"], grad_tolerance)
    close(ggate, data["ggate_dense"], grad_tolerance)
    assert torch.equal(greference, cotangent)


def test_half(device):
    data, splits, grid = case("half", device)
    plan = ops.row_plan(data["indices"], splits, *grid)
    comp = ops.compress(data["x"], plan, *grid)
    assert comp.dtype == torch.float16
    if device.type == "cpu":
        assert torch.equal(comp, data["comp"])
    else:  # Atomic adds sum in any order: one unit in the last place.
        close(comp, data["comp"].double(), 1e-3)
