"""Ragged products and ragged attention: golden values, derivatives, empty images, bad input."""

from __future__ import annotations

import patchreg_ops as ops
import pytest
import torch
from golden_reader import load

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance", "grad_tolerance"),
    [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-4)],
    ids=["f64", "f32"],
)
FLAGS = {"nn": (False, False), "nt": (False, True), "tn": (True, False), "tt": (True, True)}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request):
    return torch.device(request.param)


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
    assert error <= tolerance, f"relative error {error:.2e}"


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@PRECISIONS
@pytest.mark.parametrize("name", sorted(FLAGS))
def test_golden_product(name, dtype, tolerance, grad_tolerance, place):
    data = {key: value.to(place) for key, value in load("dge", "ops_ragged").group(name).items()}
    a, b = (data[key].to(dtype).requires_grad_() for key in "ab")
    out = ops.ragged_matmul(a, b, data["a_lengths"], data["b_lengths"], *FLAGS[name])
    close(out, data["out"], tolerance)
    ga, gb = torch.autograd.grad(out, (a, b), data["g_out"].to(dtype))
    close(ga, data["ga"], grad_tolerance)
    close(gb, data["gb"], grad_tolerance)


@PRECISIONS
@pytest.mark.parametrize("name", ["attn_a", "attn_b"])
def test_golden_attention(name, dtype, tolerance, grad_tolerance, place):
    data = {key: value.to(place) for key, value in load("dge", "ops_ragged").group(name).items()}
    inputs = [data[key].to(dtype).requires_grad_() for key in "qkv"]
    out = ops.ragged_attention(*inputs, data["q_lengths"].tolist(), float(data["scale"]))
    close(out, data["out"], tolerance)
    grads = torch.autograd.grad(out, inputs, data["g_out"].to(dtype))
    for name, grad in zip(("gq", "gk", "gv"), grads, strict=True):
        close(grad, data[name], grad_tolerance)


CASES = [  # name, a_lengths, width of a, b_lengths, width of b
    ("nn", (3, 0, 2), 4, (4, 4, 4), 5),
    ("nt", (1, 4, 0), 3, (2, 2, 2), 3),
    ("tn", (3, 0, 1), 2, (3, 0, 1), 4),
    ("tt", (2, 2, 2), 3, (4, 4, 4), 2),
]


@pytest.mark.parametrize(("name", "a_lengths", "a_width", "b_lengths", "b_width"), CASES)
def test_product_against_a_loop_and_gradcheck(name, a_lengths, a_width, b_lengths, b_width):
    a = randn(2, sum(a_lengths), a_width).requires_grad_()
    b = randn(2, sum(b_lengths), b_width).requires_grad_()
    transpose_a, transpose_b = FLAGS[name]
    parts = []
    for first, second in zip(a.split(a_lengths, 1), b.split(b_lengths, 1), strict=True):
        first = first.mT if transpose_a else first
        parts.append(first @ (second.mT if transpose_b else second))
    expected = torch.cat(parts, dim=1)

    def product(a, b):
        return ops.ragged_matmul(a, b, a_lengths, b_lengths, transpose_a, transpose_b)

    assert torch.allclose(product(a, b), expected, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(product, (a, b))


def test_attention_gradcheck_and_other_images_do_not_matter():
    query, key, value = (randn(2, 6, 3), randn(2, 3, 4, 3), randn(2, 3, 4, 3))
    lengths = (4, 0, 2)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    assert torch.autograd.gradcheck(
        lambda *tensors: ops.ragged_attention(*tensors, lengths, 0.7), inputs
    )
    out = ops.ragged_attention(*inputs, lengths)
    gradients = torch.autograd.grad(out[:, 4:].sum(), inputs)
    assert gradients[0][:, :4].abs().max() == 0
    assert gradients[1][:, :2].abs().max() == 0
    assert gradients[2][:, 2].abs().max() > 0
    alone = ops.ragged_attention(query[:, 4:], key[:, 2:], value[:, 2:], (2,))
    assert torch.allclose(out[:, 4:], alone, rtol=1e-13, atol=0)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_no_queries(lengths):
    query = randn(2, 0, 3).requires_grad_()
    key = randn(2, len(lengths), 4, 3).requires_grad_()
    out = ops.ragged_attention(query, key, key, lengths)
    assert out.shape == (2, 0, 3)
    out.sum().backward()
    assert key.grad.abs().sum() == 0
    product = ops.ragged_matmul(query, randn(2, 3 * len(lengths), 5), lengths, (3,) * len(lengths))
    assert product.shape == (2, 0, 5)
    sums = ops.ragged_matmul(query, randn(2, 0, 5), lengths, lengths, transpose_a=True)
    assert torch.equal(sums, torch.zeros(2, 3 * len(lengths), 5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(dtype, place):
    query = randn(7, 2, 8).to(place).transpose(0, 1)
    key, value = (randn(3, 5, 2, 8).to(place).permute(2, 0, 1, 3) for _ in range(2))
    lengths = torch.tensor([4, 0, 3], device=place)
    exact = ops.ragged_attention(query, key, value, lengths)
    low = ops.ragged_attention(query.to(dtype), key.to(dtype), value.to(dtype), lengths)
    assert low.dtype == dtype
    close(low, exact, 2e-2)
    flat = key.flatten(1, 2)
    product = ops.ragged_matmul(query, flat, lengths, (5, 5, 5), transpose_b=True)
    low = ops.ragged_matmul(query.to(dtype), flat.to(dtype), lengths, (5, 5, 5), transpose_b=True)
    assert low.dtype == dtype
    close(low, product, 2e-2)


A, B, Q, K = randn(2, 5, 3), randn(2, 6, 3), randn(2, 5, 3), randn(2, 2, 4, 3)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ops.ragged_matmul(A, B, (2, 2), (3, 3)), ValueError, "sum to 4, but a has 5"),
        (lambda: ops.ragged_matmul(A, B, (5,), (3, 3)), ValueError, "1 images, b_lengths 2"),
        (lambda: ops.ragged_matmul(A, B, (6, -1), (3, 3)), ValueError, "negative"),
        (lambda: ops.ragged_matmul(A, B, (2, 3), (2, 4)), ValueError, "image 0: op.a. has 3"),
        (lambda: ops.ragged_matmul(A, B, (2, 3), (2, 4), False, True), ValueError, "differ"),
        (lambda: ops.ragged_matmul(A, B, (2.0, 3.0), (3, 3)), TypeError, "holds 2.0"),
        (lambda: ops.ragged_matmul(A, B.float(), (2, 3), (3, 3)), TypeError, "one dtype"),
        (lambda: ops.ragged_matmul(A[:1], B, (2, 3), (3, 3)), ValueError, "a has 1 heads, b 2"),
        (lambda: ops.ragged_attention(Q, K, K, (5,)), ValueError, "h, B, M, d"),
        (lambda: ops.ragged_attention(Q, K, K, (4, 2)), ValueError, "sum to 6"),
        (lambda: ops.ragged_attention(Q, K, K[..., :2], (4, 1)), ValueError, "value has shape"),
        (lambda: ops.ragged_attention(Q, K[:, :, :0], K[:, :, :0], (4, 1)), ValueError, "one key"),
        (lambda: ops.ragged_attention(Q, K.to("meta"), K, (4, 1)), ValueError, "one device"),
        (lambda: ops.ragged_attention(Q.long(), K, K, (4, 1)), TypeError, "query is torch.int64"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
