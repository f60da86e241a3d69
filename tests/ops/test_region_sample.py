"""Region sampling: hand-written values, brute force, derivatives, compilation, bad input."""

from __future__ import annotations

import random

import brute_force
import numpy as np
import patchreg_ops as ops
import pytest
import torch
from patchreg_ops import _library, reference

HALF = (torch.float16, torch.bfloat16)
GEOMETRIES = [  # height, width, extra, splits
    (8, 8, 1, (4, 2, 1)),
    (6, 9, 0, (1, 2)),
    (7, 7, 1, (4, 2, 1)),  # PVT at 224 pixels, stage 4
    (14, 14, 2, (4, 2, 1)),
    (5, 3, 1, (6, 3)),
    (1, 1, 0, (4, 1, 2)),
    (3, 11, 2, (3,)),
]


def make_choice(generator, batch, height, width, splits, device="cpu"):
    shape = (batch, *ops.region_grid(height, width, max(splits)))
    return torch.randint(len(splits), shape, generator=generator).to(device)


def randn(generator, *shape, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_hand_written(device):
    """A 2x4 grid, regions of 2: left region coarse, right one fine, one extra token."""
    choice = torch.tensor([[[1, 0]]], device=device)
    plan = ops.row_plan(choice, (2, 1), 2, 4, 1)
    assert plan.rows.tolist() == [
        [0, -1, 0, 1],
        [0, 0, 0, 2],
        [0, 0, 2, 1],
        [0, 0, 3, 1],
        [0, 1, 2, 1],
        [0, 1, 3, 1],
    ]
    assert plan.lengths.tolist() == [6]
    assert plan.owner.tolist() == [[0, 1, 1, 2, 3, 1, 1, 4, 5]]
    assert plan.starts.tolist() == [0, 6]
    assert plan.starts.dtype == torch.int32
    x = torch.tensor([100.0, 1, 2, 3, 4, 5, 6, 7, 8], device=device).view(1, 9, 1)
    comp = ops.compress(x, plan, 2, 4, 1)
    assert comp.flatten().tolist() == [100, 3.5, 3, 4, 7, 8]
    update = torch.tensor([1.0, 10, 20, 30, 40, 50], device=device).view(6, 1)
    out = ops.decompress(update, plan, x)
    assert out.flatten().tolist() == [101, 11, 12, 23, 34, 15, 16, 47, 58]


def test_hand_written_clipped(device):
    """A 3x3 grid, regions of 2: squares beyond the border vanish, cut ones average real tokens."""
    choice = torch.tensor([[[1, 1], [0, 1]]], device=device)
    assert ops.row_lengths(choice, (2, 1), 3, 3, 0).tolist() == [5]
    plan = ops.row_plan(choice, (2, 1), 3, 3, 0)
    assert plan.rows.tolist() == [
        [0, 0, 0, 2],
        [0, 0, 2, 2],
        [0, 2, 0, 1],
        [0, 2, 1, 1],
        [0, 2, 2, 2],
    ]
    x = torch.arange(9.0, device=device).view(1, 9, 1).requires_grad_()
    comp = ops.compress(x, plan, 3, 3, 0)
    assert comp.flatten().tolist() == [2, 3.5, 6, 7, 8]
    comp.sum().backward()
    assert x.grad.flatten().tolist() == [0.25, 0.25, 0.5, 0.25, 0.25, 0.5, 1, 1, 1]


def test_hand_written_dense(device):
    x = torch.tensor([100.0, 1, 2, 3, 4], device=device).view(1, 5, 1)
    comp = ops.compress_dense(x, (2, 1), 2, 2, 1)
    assert comp.flatten().tolist() == [100, 1, 2, 3, 4, 2.5]
    update = torch.tensor([1.0, 10, 20, 30, 40, 5], device=device).view(1, 6, 1)
    gate = torch.tensor([0.5, 2.0], device=device).view(1, 1, 1, 2)
    out = ops.decompress_dense(update, gate, (2, 1), 2, 2, 1, reference=x)
    assert out.flatten().tolist() == [101, 16, 22, 28, 34]
    assert ops.decompress_dense(update, gate, (2, 1), 2, 2, 1)[0, 0, 0] == 1


def check_against_brute_force(batch, height, width, extra, splits, channels, dtype, seed, device):
    generator = seeded(seed)
    grid = (height, width, extra)
    tolerance = {
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        torch.float16: 2e-3,
        torch.bfloat16: 2e-2,
    }[dtype]

    def near(actual, expected):
        assert actual.shape == expected.shape
        assert actual.dtype == dtype
        scale = max(1.0, float(np.abs(expected).max(initial=0)))
        error = np.abs(actual.detach().double().cpu().numpy() - expected).max(initial=0)
        assert error <= tolerance * scale

    choice = make_choice(generator, batch, height, width, splits, device)
    rows, lengths, owner = brute_force.rows_and_owner(choice.tolist(), splits, *grid)
    plan = ops.row_plan(choice, splits, *grid)
    assert plan.rows.tolist() == [list(row) for row in rows]
    assert plan.lengths.tolist() == lengths == ops.row_lengths(choice, splits, *grid).tolist()
    assert plan.owner.tolist() == owner
    assert plan.starts.tolist() == np.cumsum([0, *lengths]).tolist()
    check_padded(plan, choice, splits, grid)

    tokens = extra + height * width
    x = randn(generator, batch, tokens, channels, dtype=dtype, device=device)
    update = randn(generator, len(rows), channels, dtype=dtype, device=device)
    wide_x, wide_update = x.double().cpu().numpy(), update.double().cpu().numpy()
    near(ops.compress(x, plan, *grid), brute_force.compress(wide_x, rows, *grid))
    spread = brute_force.decompress(wide_update, rows, batch, *grid)
    near(ops.decompress(update, plan), spread)
    near(ops.decompress(update, plan, x), spread + wide_x)

    dense = brute_force.dense_rows(batch, splits, *grid)
    assert ops.dense_row_plan(batch, splits, *grid, device=device).rows.tolist() == [
        list(r) for r in dense
    ]
    comp = ops.compress_dense(x, splits, *grid)
    near(comp.flatten(0, 1), brute_force.compress(wide_x, dense, *grid))
    update = randn(generator, *comp.shape, dtype=dtype, device=device)
    gate = randn(generator, *choice.shape, len(splits), dtype=dtype, device=device)
    wide = update.double().cpu().flatten(0, 1).numpy(), gate.double().cpu().numpy()
    expected = brute_force.decompress_dense(*wide, splits, *grid)
    near(ops.decompress_dense(update, gate, splits, *grid), expected)
    near(ops.decompress_dense(update, gate, splits, *grid, reference=x), expected + wide_x)


def check_padded(plan, choice, splits, grid):
    """A plan of a fixed capacity is the exact one, filled up or cut off."""
    count, limit = len(plan.rows), grid[0] * grid[1] + grid[2]
    for capacity in (count + 3, count, max(count - 2, 1)):
        if not len(choice):
            continue
        padded = ops.row_plan(choice, splits, *grid, total=capacity, padded=True)
        held = min(count, capacity)
        assert torch.equal(padded.rows[:held], plan.rows[:held])
        assert padded.rows[held:].tolist() == [[0, 0, 0, 1]] * (capacity - held)
        assert torch.equal(padded.lengths, plan.lengths)
        assert torch.equal(padded.owner, plan.owner.clamp(max=capacity - 1))
        assert torch.equal(padded.starts, plan.starts.clamp(max=capacity))
        assert padded.owner.shape == (len(choice), limit)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_brute_force(geometry, dtype, device):
    height, width, extra, splits = geometry
    check_against_brute_force(3, height, width, extra, splits, 5, dtype, 7, device)


def random_case(rng):
    side = rng.choice([1, 2, 3, 4, 4, 4, 6, 8])
    divisors = [d for d in range(1, side) if side % d == 0]
    splits = [side, *rng.sample(divisors, rng.randint(0, min(3, len(divisors))))]
    rng.shuffle(splits)
    return {
        "batch": rng.randint(0, 3),
        "height": rng.randint(1, 13),
        "width": rng.randint(1, 13),
        "extra": rng.randint(0, 3),
        "splits": tuple(splits),
        "channels": rng.choice([1, 2, 3, 7, 8, 16, 19]),
        "dtype": rng.choice([torch.float64, torch.float32, *HALF]),
    }


def check_random_cases(count, device):
    rng = random.Random(11)
    for seed in range(count):
        check_against_brute_force(**random_case(rng), seed=seed, device=device)


def test_random_shapes(device):
    check_random_cases(300, device)


@pytest.mark.slow
def test_random_shapes_many(device):
    check_random_cases(10_000, device)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradients(geometry, device):
    height, width, extra, splits = geometry
    grid = (height, width, extra)
    generator = seeded()
    choice = make_choice(generator, 2, height, width, splits, device)
    plan = ops.row_plan(choice, splits, *grid)
    x = randn(generator, 2, extra + height * width, 2, device=device).requires_grad_()
    update = randn(generator, len(plan.rows), 2, device=device).requires_grad_()
    rows = ops.compress_dense(x, splits, *grid).shape[1]
    dense = randn(generator, 2, rows, 2, device=device).requires_grad_()
    gate = randn(generator, *choice.shape, len(splits), device=device).requires_grad_()
    check = {"fast_mode": height * width > 60}
    assert torch.autograd.gradcheck(lambda x: ops.compress(x, plan, *grid), x, **check)
    assert torch.autograd.gradcheck(lambda u, x: ops.decompress(u, plan, x), (update, x), **check)
    assert torch.autograd.gradcheck(lambda x: ops.compress_dense(x, splits, *grid), x, **check)

    def expand(update, gate, reference):
        return ops.decompress_dense(update, gate, splits, *grid, reference=reference)

    assert torch.autograd.gradcheck(expand, (dense, gate, x), **check)
    if height * width <= 60:
        assert torch.autograd.gradgradcheck(
            lambda x: ops.compress(x, plan, *grid) ** 2, x, fast_mode=True
        )
        assert torch.autograd.gradgradcheck(expand, (dense, gate, x), fast_mode=True)


def test_adjoint_in_half(device):
    """Half precision gradients equal the double ones rounded, up to the last places."""
    choice = make_choice(seeded(), 2, 7, 9, (4, 2, 1), device)
    plan = ops.row_plan(choice, (4, 2, 1), 7, 9, 1)
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)):
        results = []
        for kind in (torch.float64, dtype):
            generator = seeded(3)
            x = randn(generator, 2, 64, 4, dtype=dtype, device=device).to(kind).requires_grad_()
            g = randn(generator, len(plan.rows), 4, dtype=dtype, device=device).to(kind)
            (gx,) = torch.autograd.grad(ops.compress(x, plan, 7, 9, 1), x, g)
            (gu,) = torch.autograd.grad(
                ops.decompress(g.requires_grad_(), plan, x.detach()), g, x.detach()
            )
            results.append((gx, gu))
        for exact, rounded in zip(*results, strict=True):
            assert rounded.dtype == dtype
            torch.testing.assert_close(rounded.double(), exact, rtol=tolerance, atol=tolerance)


def test_non_contiguous(device):
    generator = seeded()
    grid = (6, 9, 1)
    choice = make_choice(generator, 2, 6, 9, (2, 1), device)
    plan = ops.row_plan(choice.transpose(1, 2).contiguous().transpose(1, 2), (2, 1), *grid)
    assert torch.equal(plan.rows, ops.row_plan(choice, (2, 1), *grid).rows)
    x = randn(generator, 55, 3, 2, device=device).permute(2, 0, 1)
    update = randn(generator, 3, len(plan.rows), device=device).T
    assert torch.equal(ops.compress(x, plan, *grid), ops.compress(x.contiguous(), plan, *grid))
    assert torch.equal(
        ops.decompress(update, plan, x), ops.decompress(update.contiguous(), plan) + x
    )
    rows = ops.compress_dense(x, (2, 1), *grid)
    assert torch.equal(rows, ops.compress_dense(x.contiguous(), (2, 1), *grid))
    gate = randn(generator, 2, *choice.shape, device=device).permute(1, 2, 3, 0)
    flipped = rows.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(
        ops.decompress_dense(flipped, gate, (2, 1), *grid, reference=x),
        ops.decompress_dense(rows, gate.contiguous(), (2, 1), *grid, reference=x.contiguous()),
    )
    upstream = update.new_ones(()).expand(2, 55, 3)  # What sum() hands back: strides of zero.
    update = update.detach().requires_grad_()
    (gu,) = torch.autograd.grad(ops.decompress(update, plan), update, upstream)
    counts = torch.bincount(plan.owner.flatten(), minlength=len(plan.rows))
    assert torch.equal(gu, counts[:, None].expand(-1, 3).double())


def test_out(device):
    """Results land in the given memory; the reference itself may be that memory."""
    splits, grid = (4, 2, 1), (7, 9, 1)
    generator = seeded()
    for dtype in (torch.float32, torch.bfloat16):
        choice = make_choice(generator, 2, 7, 9, splits, device)
        plan = ops.row_plan(choice, splits, *grid)
        x = randn(generator, 2, 64, 8, dtype=dtype, device=device)
        comp = torch.full((len(plan.rows), 8), torch.nan, dtype=dtype, device=device)
        assert ops.compress(x, plan, *grid, out=comp) is comp
        assert torch.equal(comp, ops.compress(x, plan, *grid))
        expected = ops.decompress(comp, plan, x)
        out = torch.full_like(x, torch.nan)
        assert ops.decompress(comp, plan, x, out=out) is out
        assert torch.equal(out, expected)
        assert torch.equal(ops.decompress(comp, plan, x, out=x), expected)
        assert torch.equal(ops.decompress(comp, plan, out=out), ops.decompress(comp, plan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_output(dtype, device):
    """Outputs past the size from which the CPU kernels write around the cache."""
    splits, grid = (4, 2, 1), (16, 16, 1)
    channels = 1024 * 4 // dtype.itemsize
    generator = seeded()
    choice = make_choice(generator, 20, 16, 16, splits, device)
    plan = ops.row_plan(choice, splits, *grid)
    x = randn(generator, 20, 257, channels, dtype=dtype, device=device)
    comp = ops.compress(x, plan, *grid)
    assert comp.nbytes > 8 << 20
    back = ops.decompress(comp, plan)
    expected = reference.region_pool(x.float(), plan.rows, plan.owner, *grid, True).to(dtype)
    torch.testing.assert_close(comp, expected)
    assert torch.equal(back, comp[plan.owner])


def test_bad_out():
    _, plan, x = good()
    out = torch.empty(130, 3)
    with pytest.raises(ValueError, match="out= is for inference"):
        ops.compress(x.requires_grad_(), plan, 8, 8, 1, out=out)
    with torch.no_grad():
        ops.compress(x, plan, 8, 8, 1, out=out)
    x = x.detach()
    with pytest.raises(
        ValueError, match=r"out has shape \(129, 3\) .* expected a contiguous .*130, 3"
    ):
        ops.compress(x, plan, 8, 8, 1, out=out[1:])
    with pytest.raises(ValueError, match=r"strides \(1, 130\); expected a contiguous"):
        ops.compress(x, plan, 8, 8, 1, out=torch.empty(3, 130).T)
    with pytest.raises(TypeError, match="out is torch.float64, the input is torch.float32"):
        ops.decompress(out, plan, out=torch.empty(2, 65, 3).double())


def test_empty_batch(device):
    choice = torch.zeros(0, 2, 2, dtype=torch.int64, device=device)
    plan = ops.row_plan(choice, (4, 2, 1), 8, 8, 1)
    assert plan.rows.shape == (0, 4)
    assert plan.lengths.shape == (0,)
    assert plan.owner.shape == (0, 65)
    x = torch.zeros(0, 65, 3, device=device, requires_grad=True)
    comp = ops.compress(x, plan, 8, 8, 1)
    assert comp.shape == (0, 3)
    assert ops.decompress(comp, plan, x).shape == (0, 65, 3)
    dense = ops.compress_dense(x, (4, 2, 1), 8, 8, 1)
    assert dense.shape == (0, 85, 3)
    gate = torch.zeros(0, 2, 2, 3, device=device, requires_grad=True)
    ops.decompress_dense(dense, gate, (4, 2, 1), 8, 8, 1, reference=x).sum().backward()
    assert gate.grad.shape == gate.shape
    assert x.grad.shape == x.shape


def test_sparse_equals_dense_with_hard_gates(device):
    generator = seeded()
    splits, grid = (4, 2, 1), (7, 10, 1)
    choice = make_choice(generator, 3, 7, 10, splits, device)
    plan = ops.row_plan(choice, splits, *grid)
    x = randn(generator, 3, 71, 4, device=device)
    gate = torch.nn.functional.one_hot(choice, 3).double()
    sparse = ops.decompress(ops.compress(x, plan, *grid).sin(), plan, x)
    dense = ops.compress_dense(x, splits, *grid).sin()
    dense = ops.decompress_dense(dense, gate, splits, *grid, reference=x)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-14)


def test_one_granularity_is_identity(device):
    x = randn(seeded(), 2, 17, 3, device=device)
    plan = ops.row_plan(torch.zeros(2, 1, 1, dtype=torch.int64, device=device), (4,), 4, 4, 1)
    comp = ops.compress(x, plan, 4, 4, 1)
    assert torch.equal(ops.decompress(comp, plan), x)


def operator_samples(device):
    splits, grid = [4, 2, 1], (7, 9, 1)
    generator = seeded()
    choice = make_choice(generator, 2, 7, 9, splits, device)
    plan = ops.row_plan(choice, splits, *grid)
    x = randn(generator, 2, 64, 3, device=device)
    update = randn(generator, len(plan.rows), 3, device=device)
    dense = randn(generator, *ops.compress_dense(x, splits, *grid).shape, device=device)
    gate = randn(generator, *choice.shape, 3, device=device)
    for tensor in (x, update, dense, gate):
        tensor.requires_grad_()
    op = torch.ops.patchreg
    packed = (plan.rows, plan.owner)
    yield op.region_lengths, (choice, splits, *grid)
    yield op.region_route, (gate.detach(), splits, *grid)
    yield op.region_plan, (choice, splits, *grid, len(plan.rows), False)
    yield op.region_plan, (choice, splits, *grid, len(plan.rows) + 5, True)
    for mean in (True, False):
        yield op.region_pool, (x, *packed, *grid, mean)
        yield op.region_unpool, (update, *packed, x, *grid, mean)
        yield op.region_unpool, (update, *packed, None, *grid, mean)
    with torch.no_grad():
        out = torch.empty_like(update), torch.empty_like(x)
        yield op.region_pool_out, (x.detach(), *packed, *grid, True, out[0])
        yield op.region_unpool_out, (update.detach(), *packed, x.detach(), *grid, False, out[1])
    for weight in (gate, None):
        yield op.region_pool_dense, (x, weight, splits, *grid)
        yield op.region_unpool_dense, (dense, weight, x, splits, *grid)
        yield op.region_unpool_dense, (dense, weight, None, splits, *grid)
    yield op.region_gate_dot, (x, dense, splits, *grid)
    norm = (randn(generator, 3, device=device), randn(generator, 3, device=device), 1e-6)
    tokens, rows = x.detach(), update.detach()
    heads = tokens.new_ones(len(rows), 1, 3), *(tokens[:, None, :5] for _ in range(2))
    starts = torch.tensor([0, 1, len(rows)], dtype=torch.int32)
    yield op.packed_attend, (*heads, starts, 0.5)
    yield op.sum_norm, (rows, rows.flip(0), *norm)
    yield op.region_pool_norm, (tokens, *packed, *norm, *grid)
    yield op.region_unpool_norm, (rows, rows.flip(0), plan.owner, tokens, *norm, 4, *grid)


def test_opcheck(device):
    names = set()
    for operator, arguments in operator_samples(device):
        torch.library.opcheck(operator.default, arguments)
        names.add(operator.__name__)
    assert names == set(_library.SCHEMAS)


def test_compile_fullgraph(device):
    splits, grid = (4, 2, 1), (8, 12, 1)
    generator = seeded()
    choice = make_choice(generator, 2, 8, 12, splits, device)
    plan = ops.row_plan(choice, splits, *grid)
    gate = randn(generator, *choice.shape, 3, device=device).requires_grad_()
    x = randn(generator, 2, 97, 4, device=device).requires_grad_()

    def sparse(x, choice):
        plan = ops.row_plan(choice, splits, *grid, total=total)
        return ops.decompress(ops.compress(x, plan, *grid).sin(), plan, x)

    def given_plan(x, plan):
        return ops.decompress(ops.compress(x, plan, *grid).sin(), plan, x)

    def dense(x, gate):
        update = ops.compress_dense(x, splits, *grid).sin()
        return ops.decompress_dense(update, gate, splits, *grid, reference=x)

    total = len(plan.rows)
    for function, arguments in ((sparse, (x, choice)), (given_plan, (x, plan)), (dense, (x, gate))):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        leaves = [
            value for value in arguments if isinstance(value, torch.Tensor) and value.requires_grad
        ]
        expected, actual = function(*arguments), compiled(*arguments)
        assert torch.equal(expected, actual)
        for left, right in zip(
            torch.autograd.grad(expected.square().sum(), leaves),
            torch.autograd.grad(actual.square().sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_two_forwards_before_backward(device):
    """No state between calls, and the shared cotangent survives both backward passes."""
    splits, grid = (2, 1), (4, 4, 0)
    generator = seeded()
    x = randn(generator, 2, 16, 3, device=device).requires_grad_()
    plans = [
        ops.row_plan(make_choice(generator, 2, 4, 4, splits, device), splits, *grid) for _ in "ab"
    ]
    outs = [ops.decompress(ops.compress(x, plan, *grid), plan, x) for plan in plans]
    cotangent = randn(generator, 2, 16, 3, device=device)
    kept = cotangent.clone()
    together = torch.autograd.grad(outs, x, [cotangent, cotangent])[0]
    assert torch.equal(cotangent, kept)
    alone = 0
    for plan in plans:
        out = ops.decompress(ops.compress(x, plan, *grid), plan, x)
        alone = alone + torch.autograd.grad(out, x, cotangent)[0]
    torch.testing.assert_close(together, alone)


def good():
    choice = torch.zeros(2, 2, 2, dtype=torch.int64)
    plan = ops.row_plan(choice, (4, 2, 1), 8, 8, 1)
    x = torch.zeros(2, 65, 3)
    return choice, plan, x


@pytest.mark.parametrize(
    ("splits", "kind", "message"),
    [
        ((), ValueError, "splits has 0 entries"),
        ((4, 4), ValueError, "twice"),
        ((4, 0), ValueError, "holds 0; expected positive"),
        ((4, -2), ValueError, "holds -2"),
        ((4, 3), ValueError, "split 3 of splits .* does not divide the region side 4"),
        ((4, 2.0), TypeError, "holds 2.0"),
        ((True, 2), TypeError, "holds True"),
        (torch.tensor([4, 2]), TypeError, "splits is a Tensor"),
        (4, TypeError, "splits is a int"),
    ],
)
def test_bad_splits(splits, kind, message):
    choice, _, x = good()
    for call in (
        lambda: ops.row_lengths(choice, splits, 8, 8, 1),
        lambda: ops.row_plan(choice, splits, 8, 8, 1),
        lambda: ops.dense_row_plan(2, splits, 8, 8, 1, "cpu"),
        lambda: ops.compress_dense(x, splits, 8, 8, 1),
        lambda: ops.decompress_dense(x, x, splits, 8, 8, 1),
    ):
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda c: c.int(), TypeError, "choice is torch.int32; expected an int64"),
        (lambda c: c.tolist(), TypeError, "choice is list"),
        (lambda c: c[0], ValueError, r"shape \(2, 2\); .* needs \[B, 2, 2\]"),
        (lambda c: c[:, :1], ValueError, r"shape \(2, 1, 2\)"),
        (lambda c: c + 3, ValueError, r"choice holds 3; expected indices 0..2"),
        (lambda c: c - 1, ValueError, r"choice holds -1; expected indices 0..2"),
    ],
)
def test_bad_choice(change, kind, message, device):
    if device.type == "cuda" and "holds" in message:
        pytest.skip("index values are not read on a GPU: the debug test covers them")
    choice = change(good()[0].to(device))
    for function in (ops.row_lengths, ops.row_plan):
        with pytest.raises(kind, match=message):
            function(choice, (4, 2, 1), 8, 8, 1)


def test_debug_checks_values(device, monkeypatch):
    monkeypatch.setenv("PATCHREG_OPS_DEBUG", "1")
    choice = good()[0].to(device)
    with pytest.raises(ValueError, match="choice holds 5"):
        ops.row_plan(choice + 5, (4, 2, 1), 8, 8, 1)
    with pytest.raises(ValueError, match="total is 7, but the choice makes 130 rows"):
        ops.row_plan(choice, (4, 2, 1), 8, 8, 1, total=7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_route(dtype, device):
    """The best score, the first one on ties, and NaN before all, as in argmax."""
    logits = randn(seeded(), 3, 2, 3, 3, dtype=dtype, device=device)
    logits[0, 0, 0] = 1.0
    logits[0, 0, 1] = torch.tensor([0.0, 2.0, 2.0])
    logits[1, 1, 2, 1] = torch.nan
    choice, lengths = ops.route(logits, (4, 2, 1), 7, 10, 1)
    assert torch.equal(choice, logits.argmax(dim=-1))
    assert choice[0, 0].tolist()[:2] == [0, 1]
    assert choice[1, 1, 2] == 1
    assert torch.equal(lengths, ops.row_lengths(choice, (4, 2, 1), 7, 10, 1))


def test_bad_logits():
    with pytest.raises(ValueError, match=r"logits has shape \(1, 2, 2, 2\); a 8x8 grid"):
        ops.route(torch.zeros(1, 2, 2, 2), (4, 2, 1), 8, 8, 1)
    with pytest.raises(TypeError, match="logits is torch.int64"):
        ops.route(torch.zeros(1, 2, 2, 3, dtype=torch.int64), (4, 2, 1), 8, 8, 1)


def test_bad_padding():
    choice, _, _ = good()
    with pytest.raises(ValueError, match="a padded plan needs total"):
        ops.row_plan(choice, (4, 2, 1), 8, 8, 1, padded=True)
    with pytest.raises(ValueError, match="total is 0"):
        ops.row_plan(choice, (4, 2, 1), 8, 8, 1, total=0, padded=True)
    with pytest.raises(ValueError, match="total is 1, but a batch without images makes no rows"):
        ops.row_plan(choice[:0], (4, 2, 1), 8, 8, 1, total=1, padded=True)


def test_bad_grid():
    choice, plan, x = good()
    with pytest.raises(ValueError, match="extra is -1; expected 0 or more"):
        ops.row_plan(choice, (4, 2, 1), 8, 8, -1)
    with pytest.raises(ValueError, match="extra is -1"):
        ops.compress(x, plan, 8, 8, -1)
    with pytest.raises(ValueError, match="height is 0; expected at least 1"):
        ops.row_plan(choice, (4, 2, 1), 0, 8, 1)
    with pytest.raises(ValueError, match="region is 0"):
        ops.region_grid(8, 8, 0)
    with pytest.raises(ValueError, match="total is -1"):
        ops.row_plan(choice, (4, 2, 1), 8, 8, 1, total=-1)
    with pytest.raises(ValueError, match="batch is -1"):
        ops.dense_row_plan(-1, (4, 2, 1), 8, 8, 1, "cpu")
    with pytest.raises(ValueError, match="x has 65 tokens; 0 extra tokens and a 8x8 grid make 64"):
        ops.compress(x, plan, 8, 8, 0)
    with pytest.raises(ValueError, match="x has 65 tokens; 1 extra tokens and a 8x9 grid make 73"):
        ops.compress_dense(x, (4, 2, 1), 8, 9, 1)


def test_bad_plan():
    choice, plan, x = good()
    with pytest.raises(ValueError, match="covers 2 images .* x has 1"):
        ops.compress(x[:1], plan, 8, 8, 1)
    with pytest.raises(ValueError, match=r"plan \(8, 8, 1\), x has 2 of \(4, 16, 1\)|\(4, 16, 1\)"):
        ops.compress(x, plan, 4, 16, 1)
    with pytest.raises(ValueError, match="dense plan"):
        ops.compress(x, ops.dense_row_plan(2, (4, 2, 1), 8, 8, 1, "cpu"), 8, 8, 1)
    with pytest.raises(TypeError, match="plan is a tuple"):
        ops.compress(x, tuple(plan), 8, 8, 1)
    with pytest.raises(ValueError, match="update has 3 rows, the plan 130"):
        ops.decompress(torch.zeros(3, 3), plan)
    with pytest.raises(ValueError, match="the plan is on cpu, the tensor on meta"):
        ops.compress(x.to("meta"), plan, 8, 8, 1)


def test_bad_tensors():
    choice, plan, x = good()
    update = torch.zeros(130, 3)
    with pytest.raises(TypeError, match="x is torch.int64; expected a float64/32/16 or bfloat16"):
        ops.compress(x.long(), plan, 8, 8, 1)
    with pytest.raises(ValueError, match=r"x has shape \(65, 3\); expected 3 dimensions"):
        ops.compress(x[0], plan, 8, 8, 1)
    with pytest.raises(TypeError, match="reference is torch.float64, update is torch.float32"):
        ops.decompress(update, plan, x.double())
    with pytest.raises(ValueError, match=r"reference has shape \(2, 65, 2\); expected \[B, N, C\]"):
        ops.decompress(update, plan, x[..., :2])
    with pytest.raises(ValueError, match="reference is on meta, update on cpu"):
        ops.decompress(update, plan, x.to("meta"))
    dense, gate = torch.zeros(2, 85, 3), torch.zeros(2, 2, 2, 3)
    with pytest.raises(ValueError, match="update has 84 rows per image; .* make 85"):
        ops.decompress_dense(dense[:, 1:], gate, (4, 2, 1), 8, 8, 1)
    with pytest.raises(
        ValueError, match=r"gate has shape \(2, 2, 2, 2\); expected .* \(2, 2, 2, 3\)"
    ):
        ops.decompress_dense(dense, gate[..., :2], (4, 2, 1), 8, 8, 1)
    with pytest.raises(TypeError, match="gate is torch.float16, update is torch.float32"):
        ops.decompress_dense(dense, gate.half(), (4, 2, 1), 8, 8, 1)
    with pytest.raises(TypeError, match="gate is torch.int64; expected a float"):
        ops.decompress_dense(dense, gate.long(), (4, 2, 1), 8, 8, 1)
