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


def looked(query, key, value, counts, scale=None):
    """The library, image by image."""
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            part.transpose(0, 1), key[image], value[image], scale=scale
        )
        .transpose(0, 1)
        .flatten(1)
        for image, part in enumerate(query.split(counts))
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("path", ["compiled", "reference"])
@pytest.mark.parametrize(
    ("keys", "width"), [(1, 16), (16, 64), (65, 48), (257, 64), (33, 80), (9, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_packed_attention_is_that_of_the_library(keys, width, dtype, path):
    torch.manual_seed(keys + width)
    counts = [5, 0, 24, 1, 61]
    query = randn(sum(counts), 3, width, dtype=dtype)
    # Keys and values as a projection leaves them: interleaved.
    held = randn(5, keys, 2, 3, width, dtype=dtype)
    key, value = held.permute(2, 0, 3, 1, 4)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    call = ops.packed_attend if path == "compiled" else ops.reference.packed_attend
    extra = () if path == "compiled" else (width**-0.5,)
    found = call(query, key, value, starts, *extra)
    expected = looked(query.double(), key.double(), value.double(), counts)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}[dtype]
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < tolerance
    scaled = ops.packed_attend(query, key, value, starts, 2.0)
    sharp = looked(query.double(), key.double(), value.double(), counts, 2.0)
    assert (scaled.double() - sharp).abs().max() < 20 * tolerance


def test_packed_attention_of_extreme_scores():
    query = torch.ones(3, 1, 16)
    key, value = torch.zeros(1, 1, 20, 16), torch.arange(20.0).view(1, 1, 20, 1).repeat(1, 1, 1, 16)
    key[0, 0, 7] = 1e4
    starts = torch.tensor([0, 3], dtype=torch.int32)
    assert torch.equal(ops.packed_attend(query, key, value, starts), torch.full((3, 16), 7.0))
    # Equal scores, however low, weigh the same.
    flat = ops.packed_attend(query, torch.full_like(key, -1e6), value, starts)
    assert torch.allclose(flat, torch.full((3, 16), 9.5))
    key[0, 0, 3, 0] = float("nan")
    assert ops.packed_attend(query, key, value, starts).isnan().all()


def test_packed_attention_on_two_threads_and_without_queries():
    before = torch.get_num_threads()
    query, key = torch.randn(40, 4, 32), torch.randn(3, 4, 50, 32)
    starts = torch.tensor([0, 7, 7, 40], dtype=torch.int32)
    one = ops.packed_attend(query, key, key, starts)
    try:
        torch.set_num_threads(2)
        assert torch.equal(ops.packed_attend(query, key, key, starts), one)
    finally:
        torch.set_num_threads(before)
    assert ops.packed_attend(query[:0], key, key, 0 * starts).shape == (0, 128)
    assert ops.packed_attend(query[:0], key[:0], key[:0], starts[:1]).shape == (0, 128)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (dict(starts=torch.tensor([0, 3, 5])), TypeError, "int32"),
        (dict(starts=torch.tensor([0, 5], dtype=torch.int32)), ValueError, "expected starts"),
        (dict(starts=torch.tensor([0, 6, 5], dtype=torch.int32)), IndexError, "falls"),
        (dict(starts=torch.tensor([0, 3, 6], dtype=torch.int32)), IndexError, "expected 0 to 5"),
        (dict(query=torch.ones(5, 2, 16).requires_grad_()), ValueError, "gradient"),
        (dict(query=torch.ones(5, 2, 16).double()), TypeError, "float"),
        (dict(query=torch.ones(5, 3, 16)), ValueError, "fit together"),
        (dict(key=torch.ones(2, 2, 0, 16), value=torch.ones(2, 2, 0, 16)), ValueError, "no keys"),
    ],
)
def test_packed_attention_refuses(change, kind, words):
    given = dict(
        query=torch.ones(5, 2, 16),
        key=torch.ones(2, 2, 4, 16),
        value=torch.ones(2, 2, 4, 16),
        starts=torch.tensor([0, 3, 5], dtype=torch.int32),
    )
    with pytest.raises(kind, match=words):
        ops.packed_attend(**(given | change))
