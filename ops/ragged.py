"""Products of packed rows: every image has its own number of rows, given by a list of lengths.

`ragged_matmul` and `ragged_attention` pad the images to the longest one and call one batched library
routine, whatever the number of images. The padding is zero, or its results are dropped, so it changes
nothing. `packed_attend` is for inference on a CPU and pads nothing.

Shape letters: B images, h heads, L rows of all images, M keys, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .region_sample import _check_float, _check_same, _fake

Lengths = Sequence[int] | Tensor


def ragged_matmul(
    a: Tensor,
    b: Tensor,
    a_lengths: Lengths,
    b_lengths: Lengths,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> Tensor:
    """Product op(a_i) op(b_i) of every image i, packed again; op transposes the matrices if asked.

    Source: DGE, `batched_sparse_gemm`.

    Args:
        a: first factors, rows of all images one after the other.
        b: second factors, likewise.
        a_lengths: rows of `a` in each image, 0 or more; a tensor on an accelerator is waited for.
        b_lengths: rows of `b` in each image, 0 or more.
        transpose_a: multiply by the transposed matrix of each image.
        transpose_b: multiply by the transposed matrix of each image.

    Shape:
        a [h, sum of a_lengths, Ka], b [h, sum of b_lengths, Kb]; returns [h, rows of the products,
        columns]; an image has a_length rows (Ka with transpose_a), and columns are Kb, or the
        b_length that all images share with transpose_b.

    Raises:
        TypeError, ValueError: for arguments that do not fit together.

    Differs from official:
        the gradient is right for a transposed `a` too; no streams of its own.
    """
    _check_float("a", a, 3)
    _check_float("b", b, 3)
    _check_same("b", b, "a", a)
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"a has {a.shape[0]} heads, b {b.shape[0]}; expected the same.")
    a_counts = _check_lengths("a_lengths", a_lengths, "a", a.shape[1])
    b_counts = _check_lengths("b_lengths", b_lengths, "b", b.shape[1])
    if len(a_counts) != len(b_counts):
        raise ValueError(
            f"a_lengths has {len(a_counts)} images, b_lengths {len(b_counts)}; expected the same."
        )
    if transpose_b and len(set(b_counts)) > 1:
        raise ValueError(
            f"b_lengths {b_counts} differ, but with transpose_b they are the columns of the "
            "products, which are packed into one tensor; expected one length for all images."
        )
    for image, (rows_a, rows_b) in enumerate(zip(a_counts, b_counts)):
        inner_a = rows_a if transpose_a else a.shape[2]
        inner_b = b.shape[2] if transpose_b else rows_b
        if inner_a != inner_b:
            raise ValueError(
                f"image {image}: op(a) has {inner_a} columns, op(b) {inner_b} rows; expected the "
                "same. Check the lengths and the transpose flags."
            )
    if not a_counts:  # Nothing tells the number of columns of a transposed b.
        return a[..., :0] @ (b[..., :0] if transpose_b else b)
    first, second = _unpack(a, a_counts), _unpack(b, b_counts)
    first = first.transpose(2, 3) if transpose_a else first
    second = second.transpose(2, 3) if transpose_b else second
    product = first @ second
    return product.flatten(1, 2) if transpose_a else _pack(product, a_counts)


def ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scale: float | None = None
) -> Tensor:
    """Softmax attention of packed queries, each over all keys of its image.

    Source: DGE, `batched_sparse_attention`.

    Args:
        query: queries of all images one after the other.
        key: keys, equally many per image.
        value: values.
        lengths: queries of each image, 0 or more; a tensor on an accelerator is waited for.
        scale: factor of the scores; None for d^-0.5.

    Shape:
        query [h, L, d], key and value [h, B, M, d]; returns [h, L, d].

    Raises:
        TypeError, ValueError: for arguments that do not fit together.

    Differs from official:
        it has a gradient; images without queries and half precision work.
    """
    _check_float("query", query, 3)
    for name, tensor in (("key", key), ("value", value)):
        _check_float(name, tensor, 4)
        _check_same(name, tensor, "query", query)
    counts = _check_lengths("lengths", lengths, "query", query.shape[1])
    heads, _, width = query.shape
    expected = (heads, len(counts), key.shape[2], width)
    for name, tensor in (("key", key), ("value", value)):
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; {heads} heads of width {width} and "
                f"{len(counts)} lengths need [h, B, M, d] = {expected}."
            )
    if 0 in (width, key.shape[2]):
        raise ValueError(
            f"key has shape {tuple(key.shape)}; expected at least one key and channel."
        )
    full = _unpack(query, counts).transpose(0, 1)
    out = F.scaled_dot_product_attention(
        full, key.transpose(0, 1), value.transpose(0, 1), scale=scale
    )
    return _pack(out.transpose(0, 1), counts)


def packed_attend(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float | None = None
) -> Tensor:
    """Softmax attention of packed queries, each over all keys of its image, for inference on a CPU.

    The compiled kernel (float32, widths that 16 divides, last dimension without gaps) needs no padding and no
    call per image; anything else goes image by image through the library.

    Source: DGE, `batched_sparse_attention`.

    Args:
        query: queries of all images one after the other.
        key: keys, equally many per image; any strides.
        value: values, likewise.
        starts: first query of every image, then their number; int32 on the CPU.
        scale: factor of the scores; None for d^-0.5.

    Shape:
        query [L, h, d], key and value [B, h, M, d], starts [B + 1]; returns [L, h * d].

    Raises:
        TypeError, ValueError, IndexError: for arguments that do not fit together, or that need a gradient.
    """
    _check_float("query", query, 3)
    for name, tensor in (("key", key), ("value", value)):
        _check_float(name, tensor, 4)
        _check_same(name, tensor, "query", query)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        raise ValueError(
            "query, key or value needs a gradient, which packed_attend has not; use ragged_attention, or "
            "torch.no_grad() for inference."
        )
    factor = query.shape[2] ** -0.5 if scale is None else scale
    return torch.ops.patchreg.packed_attend(query, key, value, starts, factor)


def _check_lengths(name: str, lengths: Lengths, packed_name: str, rows: int) -> list[int]:
    values = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if isinstance(lengths, Tensor) and lengths.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(lengths.shape)}; expected one length per image.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} holds {value!r}; expected integers, the rows of each image.")
    if any(value < 0 for value in values):
        raise ValueError(f"{name} {values} holds a negative number; expected 0 or more rows.")
    if sum(values) != rows:
        raise ValueError(
            f"{name} {values} sum to {sum(values)}, but {packed_name} has {rows} packed rows. "
            "Pass the lengths these rows were packed with."
        )
    return values


def _slots(counts: list[int], device: torch.device) -> Tensor:
    """Place of every packed row in the padded images."""
    longest = max(counts)
    return torch.cat([torch.arange(count) + i * longest for i, count in enumerate(counts)]).to(
        device
    )


def _unpack(packed: Tensor, counts: list[int]) -> Tensor:
    """Packed rows [h, L, K] as images padded with zeros [h, B, longest, K]."""
    heads, rows, width = packed.shape
    longest = max(counts, default=0)
    if rows != len(counts) * longest:
        packed = packed.new_zeros(heads, len(counts) * longest, width).index_copy(
            1, _slots(counts, packed.device), packed
        )
    return packed.reshape(heads, len(counts), longest, width)


def _pack(padded: Tensor, counts: list[int]) -> Tensor:
    """Inverse of `_unpack`."""
    flat = padded.flatten(1, 2)
    if flat.shape[1] == sum(counts):
        return flat
    return flat.index_select(1, _slots(counts, padded.device))


@_fake("packed_attend")
def _(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
