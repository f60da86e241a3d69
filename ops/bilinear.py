"""Bilinear attention: weighted sums of feature maps sampled at any points.

A point is (x, y) in pixels, (0, 0) the centre of the first pixel. Its sample is the bilinear mean
of the four pixels around it; a pixel outside the map counts 0 and its weight is not shared out. At
integer coordinates the gradient is the right-sided derivative; where all four pixels are outside,
every gradient is 0. Coordinates may be of any size.

The sums run in one pass of `embedding_bag` over the map's pixels, so that no sample is stored; in
half precision they run in float32 and round once. Gradients exist to first order.

Shape letters: B images, H x W map, C channels, G queries of an image, P points of a query, L
packed queries.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from .region_sample import _check_float, _check_same


def bilinear_pointwise(values: Tensor, points: Tensor, weight: Tensor) -> Tensor:
    """Sum over points of weight times sample: sparse attention with given weights.

    Source: DPVT of the DGE code, pointwise bilinear attention.

    Args:
        values: maps that are sampled.
        points: sampling points (x, y) in pixels; with half-precision values float32 is allowed, and
            needed for maps wider than 256 (float16: 2048) pixels.
        weight: weight of every point.

    Shape:
        values [B, H, W, C], points [B, G, P, 2], weight [B, G, P]; returns [B, G, C].

    Raises:
        TypeError, ValueError: for arguments that do not fit together; for coordinates that are not
            finite only with PATCHREG_OPS_DEBUG=1, which waits for an accelerator.

    Differs from official:
        any number of points, sizes beyond 2^31 elements; coordinates beyond 32-bit integers and
        not-a-number are safe (the latter gives not-a-number).
    """
    _check_maps(values, points, 4)
    _check_weight(weight, values, tuple(points.shape[:3]), "[B, G, P]")
    batch, groups = points.shape[:2]
    image = torch.arange(batch, device=values.device).repeat_interleave(groups)
    out = _weighted_sum(values, image, points.flatten(0, 1), weight.flatten(0, 1))
    return out.view(batch, groups, values.shape[3])


def bilinear_channelwise(values: Tensor, points: Tensor, weight: Tensor) -> Tensor:
    """Dot product of a query vector with every sample: attention scores at sampled keys.

    Source: DPVT of the DGE code, channelwise bilinear attention.

    Args:
        values: maps that are sampled.
        points: sampling points (x, y) in pixels, as in `bilinear_pointwise`.
        weight: query vectors.

    Shape:
        values [B, H, W, C], points [B, G, P, 2], weight [B, G, C]; returns [B, G, P].

    Raises:
        TypeError, ValueError: as in `bilinear_pointwise`.
    """
    _check_maps(values, points, 4)
    _check_weight(weight, values, (*points.shape[:2], values.shape[3]), "[B, G, C]")
    batch, groups, count = points.shape[:3]
    image = torch.arange(batch, device=values.device).repeat_interleave(groups * count)
    wide = _wide(values)
    ones = wide.new_ones(len(image), 1)
    samples = _weighted_sum(wide, image, points.reshape(-1, 1, 2), ones)
    samples = samples.view(batch, groups, count, values.shape[3])
    return (samples @ weight.to(wide.dtype).unsqueeze(-1)).squeeze(-1).to(values.dtype)


def bilinear_pointwise_packed(
    values: Tensor, points: Tensor, weight: Tensor, image: Tensor
) -> Tensor:
    """Pointwise form for packed queries, each of which names its image.

    Source: DPVT of the DGE code, sparse pointwise bilinear attention.

    Args:
        values: maps that are sampled.
        points: sampling points (x, y) in pixels, as in `bilinear_pointwise`.
        weight: weight of every point.
        image: image of every query; checked on an accelerator only with PATCHREG_OPS_DEBUG=1.

    Shape:
        values [B, H, W, C], points [L, P, 2], weight [L, P], image [L] int64; returns [L, C].

    Raises:
        TypeError, ValueError: as in `bilinear_pointwise`, and for images that do not exist.

    Differs from official:
        it has a gradient.
    """
    _check_maps(values, points, 3)
    _check_weight(weight, values, tuple(points.shape[:2]), "[L, P]")
    if not isinstance(image, Tensor) or image.dtype != torch.int64:
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image is {kind}; expected an int64 tensor, the image of every query.")
    if tuple(image.shape) != (len(points),) or image.device != values.device:
        raise ValueError(
            f"image has shape {tuple(image.shape)} on {image.device}; expected one entry for each "
            f"of the {len(points)} queries, on {values.device}."
        )
    if len(image) and (image.is_cpu or _debugs()):
        low, high = (int(bound) for bound in torch.aminmax(image))
        if low < 0 or high >= len(values):
            raise ValueError(
                f"image holds {low if low < 0 else high}; expected 0..{len(values) - 1}, "
                f"the {len(values)} maps in values."
            )
    return _weighted_sum(values, image, points, weight)


def _debugs() -> bool:
    return os.environ.get("PATCHREG_OPS_DEBUG") == "1" and not torch.compiler.is_compiling()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() < 4 else tensor


def _check_maps(values: Tensor, points: Tensor, ndim: int) -> None:
    _check_float("values", values, 4)
    if 0 in values.shape[1:]:
        raise ValueError(
            f"values has shape {tuple(values.shape)}; expected [B, H, W, C] with at least one "
            "pixel and channel."
        )
    _check_float("points", points, ndim)
    if points.shape[-1] != 2 or points.shape[-2] == 0:
        raise ValueError(
            f"points has shape {tuple(points.shape)}; expected [..., P, 2], at least one (x, y)."
        )
    if ndim == 4 and len(points) != len(values):
        raise ValueError(
            f"points are for {len(points)} images, values has {len(values)}; expected the same."
        )
    if not (points.dtype == torch.float32 and values.element_size() == 2):
        _check_same("points", points, "values", values)
    elif points.device != values.device:
        raise ValueError(f"points is on {points.device}, values on {values.device}; expected one.")
    if _debugs() and not bool(points.isfinite().all()):
        raise ValueError(
            "points holds coordinates that are not finite; expected finite pixels. "
            "Check what predicts the offsets."
        )


def _check_weight(weight: Tensor, values: Tensor, shape: tuple[int, ...], letters: str) -> None:
    _check_float("weight", weight, len(shape))
    if tuple(weight.shape) != shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected {letters} = {shape}, as the points."
        )
    _check_same("weight", weight, "values", values)


def _corners(position: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """The two pixels beside a coordinate, each with its weight, which is 0 outside the map."""
    # One pixel beyond the neighbours of the map: the same sample, and it fits an integer.
    position = position.clamp(-2, size + 1)
    low = position.detach().floor()
    share = position - low
    pairs = []
    for pixel, part in ((low, 1 - share), (low + 1, share)):
        # Not-a-number counts as inside, so that it shows in the result; it reads pixel 0.
        outside = (pixel < 0) | (pixel > size - 1)
        index = pixel.nan_to_num(0).clamp(0, size - 1).long()
        pairs.append((index, torch.where(outside, torch.zeros_like(part), part)))
    return tuple(pairs)


def _weighted_sum(values: Tensor, image: Tensor, points: Tensor, weight: Tensor) -> Tensor:
    """Sum over P of weight times sample: values [B, H, W, C], image [R], points [R, P, 2], weight
    [R, P] -> [R, C]."""
    _, height, width, channels = values.shape
    table = _wide(values).reshape(-1, channels)
    x, y = points.to(table.dtype).unbind(-1)
    weight = weight.to(table.dtype)
    start = (image * (height * width)).unsqueeze(1)
    index, share = [], []
    for row, down in _corners(y, height):
        for column, right in _corners(x, width):
            index.append(start + row * width + column)
            share.append(weight * down * right)
    out = F.embedding_bag(
        torch.cat(index, dim=1), table, mode="sum", per_sample_weights=torch.cat(share, dim=1)
    )
    return out.to(values.dtype)
