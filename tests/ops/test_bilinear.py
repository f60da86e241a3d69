"""Bilinear attention: golden values, hand-written numbers, derivatives, odd coordinates."""

from __future__ import annotations

import patchreg_ops as ops
import pytest
import torch
import torch.nn.functional as F
from golden_reader import load

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance", "grad_tolerance"),
    [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-4)],
    ids=["f64", "f32"],
)
FORMS = {"pw": ops.bilinear_pointwise, "cw": ops.bilinear_channelwise}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request):
    return torch.device(request.param)


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
    assert error <= tolerance, f"relative error {error:.2e}"


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@PRECISIONS
@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("name", ["a", "b"])
def test_golden(name, form, dtype, tolerance, grad_tolerance, place):
    data = {key: value.to(place) for key, value in load("dge", "ops_bilinear").group(name).items()}
    inputs = [data[key].to(dtype).requires_grad_() for key in ("input", "grid", f"{form}_weight")]
    out = FORMS[form](*inputs)
    close(out, data[f"{form}_out"], tolerance)
    grads = torch.autograd.grad(out, inputs, data[f"{form}_g_out"].to(dtype))
    for key, grad in zip(("ginput", "ggrid", "gweight"), grads, strict=True):
        close(grad, data[f"{form}_{key}"], grad_tolerance)


@PRECISIONS
@pytest.mark.parametrize("name", ["a", "b"])
def test_golden_packed(name, dtype, tolerance, grad_tolerance, place):
    data = {key: value.to(place) for key, value in load("dge", "ops_bilinear").group(name).items()}
    values, points, weight = (data[key].to(dtype) for key in ("input", "spw_grid", "spw_weight"))
    out = ops.bilinear_pointwise_packed(values, points, weight, data["spw_batches"])
    close(out, data["spw_out"], tolerance)


def sample(x, y):
    """Value and gradient of one sample of the 2 x 3 map [[1, 2, 4], [8, 16, 32]]."""
    values = torch.tensor([[1.0, 2, 4], [8, 16, 32]]).view(1, 2, 3, 1)
    point = torch.tensor([x, y], dtype=torch.float32).view(1, 1, 1, 2).requires_grad_()
    weight = torch.ones(1, 1, 1, requires_grad=True)
    out = ops.bilinear_pointwise(values, point, weight)
    gpoint, gweight = torch.autograd.grad(out.sum(), (point, weight))
    return [out.item(), *gpoint.flatten().tolist(), gweight.item()]


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0.5, 0.5, [6.75, 4.5, 10.5]),
        (1.0, 0.0, [2, 2, 14]),  # Right-sided derivatives: 4 - 2 and 16 - 2.
        (2.0, 1.0, [32, -32, -32]),  # To the right of the last pixel comes zero.
        (2.25, 0.0, [3, -4, 21]),  # 0.75 * 4; 0.75 * (32 - 4).
        (-0.5, 0.0, [0.5, 1, 3.5]),
        (-1.0, 0.0, [0, 1, 0]),  # The pixel at 0 enters from the right.
        (-1.001, 0.0, [0, 0, 0]),
        (3.0, 0.0, [0, 0, 0]),
        (0.0, 2.0, [0, 0, 0]),
        (3e9, 0.5, [0, 0, 0]),
        (-1e30, 1e30, [0, 0, 0]),
        (float("inf"), 0.0, [0, 0, 0]),
    ],
)
def test_hand_written(x, y, expected):
    assert sample(x, y) == pytest.approx([*expected, expected[0]], rel=1e-5, abs=1e-6)


def test_not_a_number_shows_and_debug_mode_refuses_it(monkeypatch):
    assert sample(float("nan"), 0.5)[0] != sample(float("nan"), 0.5)[0]
    monkeypatch.setenv("PATCHREG_OPS_DEBUG", "1")
    for bad in ("nan", "inf"):
        with pytest.raises(ValueError, match="not finite"):
            sample(float(bad), 0.5)
    assert sample(0.5, 0.5)[0] == 6.75


@pytest.mark.parametrize("form", sorted(FORMS))
def test_gradcheck(form):
    values = randn(2, 4, 3, 2).requires_grad_()
    points = (torch.rand(2, 3, 20, 2, dtype=torch.float64) * 6 - 1.5).requires_grad_()
    weight = randn(2, 3, 20 if form == "pw" else 2).requires_grad_()
    assert torch.autograd.gradcheck(FORMS[form], (values, points, weight))


def test_packed_gradcheck_and_agreement():
    values = randn(3, 4, 3, 2).requires_grad_()
    points = (torch.rand(3, 4, 5, 2, dtype=torch.float64) * 6 - 1.5).requires_grad_()
    weight = randn(3, 4, 5).requires_grad_()
    image = torch.arange(3).repeat_interleave(4)

    def packed(values, points, weight):
        return ops.bilinear_pointwise_packed(values, points, weight, image)

    inputs = (values, points.detach().flatten(0, 1), weight.detach().flatten(0, 1))
    expected = ops.bilinear_pointwise(values, points, weight).flatten(0, 1)
    assert torch.equal(packed(*inputs), expected)
    assert torch.autograd.gradcheck(packed, [tensor.requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("size", [(5, 7), (1, 6), (1, 1)])
def test_agrees_with_grid_sample(size):
    height, width = size
    values = randn(2, height, width, 3)
    points = torch.rand(2, 9, 4, 2, dtype=torch.float64) * 10 - 2
    weight = randn(2, 9, 4)
    scale = torch.tensor([width, height], dtype=torch.float64)
    grid = (2 * points + 1) / scale - 1
    samples = F.grid_sample(
        values.permute(0, 3, 1, 2), grid, padding_mode="zeros", align_corners=False
    )
    expected = torch.einsum("bcgp,bgp->bgc", samples, weight)
    close(ops.bilinear_pointwise(values, points, weight), expected, 1e-12)


@pytest.mark.parametrize(("batch", "groups"), [(0, 3), (2, 0)])
def test_empty(batch, groups):
    values = randn(batch, 4, 5, 3).requires_grad_()
    points = randn(batch, groups, 2, 2).requires_grad_()
    out = ops.bilinear_pointwise(values, points, randn(batch, groups, 2))
    assert out.shape == (batch, groups, 3)
    gradients = torch.autograd.grad(out.sum(), (values, points))
    assert [grad.abs().sum() for grad in gradients] == [0, 0]
    assert ops.bilinear_channelwise(values, points, randn(batch, groups, 3)).shape == (
        batch,
        groups,
        2,
    )
    none = torch.zeros(0, dtype=torch.int64)
    packed = ops.bilinear_pointwise_packed(values, randn(0, 2, 2), randn(0, 2), none)
    assert packed.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", sorted(FORMS))
def test_half_precision_rounds_once(form, dtype, place):
    values = randn(2, 6, 7, 8).to(place, dtype).transpose(1, 2)
    points = (torch.rand(2, 5, 3, 2) * 8 - 1).to(place)
    weight = randn(2, 5, 3 if form == "pw" else 8).to(place, dtype)
    inputs = [tensor.requires_grad_() for tensor in (values, points, weight)]
    out = FORMS[form](*inputs)
    assert out.dtype == dtype
    wide = FORMS[form](values.double(), points.double(), weight.double())
    close(out, wide, 2.0 ** (-11 if dtype == torch.float16 else -8))
    gradients = torch.autograd.grad(out.float().sum(), inputs)
    assert [grad.dtype for grad in gradients] == [dtype, torch.float32, dtype]


V, P, W, WC = randn(2, 4, 5, 3), randn(2, 6, 2, 2), randn(2, 6, 2), randn(2, 6, 3)
I6 = torch.zeros(6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ops.bilinear_pointwise(V[:, :0], P, W), ValueError, "at least one pixel"),
        (lambda: ops.bilinear_pointwise(V, P[..., :1], W), ValueError, "points has shape"),
        (lambda: ops.bilinear_pointwise(V, P[:, :, :0], W[:, :, :0]), ValueError, "at least one"),
        (lambda: ops.bilinear_pointwise(V, P[:1], W[:1]), ValueError, "1 images, values has 2"),
        (lambda: ops.bilinear_pointwise(V, P, WC), ValueError, "expected .B, G, P. = .2, 6, 2."),
        (lambda: ops.bilinear_channelwise(V, P, W), ValueError, "expected .B, G, C. = .2, 6, 3."),
        (lambda: ops.bilinear_pointwise(V, P.float(), W), TypeError, "one dtype"),
        (lambda: ops.bilinear_pointwise(V, P, W.float()), TypeError, "one dtype"),
        (lambda: ops.bilinear_pointwise(V, P.to("meta"), W), ValueError, "one device"),
        (lambda: ops.bilinear_pointwise(V.long(), P, W), TypeError, "values is torch.int64"),
        (
            lambda: ops.bilinear_pointwise_packed(V, P[0], W[0], I6 + 2),
            ValueError,
            "image holds 2; expected 0..1",
        ),
        (
            lambda: ops.bilinear_pointwise_packed(V, P[0], W[0], I6[:5]),
            ValueError,
            "each of the 6 queries",
        ),
        (lambda: ops.bilinear_pointwise_packed(V, P[0], W[0], I6.int()), TypeError, "int64"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
