"""Attention of packed queries, in several exact ways behind one function.

The images of a batch have different numbers of queries, but each of them has all of its keys; so no
way needs a mask.

Letters: B images, h heads, d channels of a head, M keys, L packed queries of the batch.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
from patchreg_ops import RowPlan, build_info, packed_attend
from torch import Tensor

from patchreg.models.layers import attend
from patchreg.utils.errors import ConfigError, did_you_mean

BACKENDS = ("auto", "varlen", "native", "padded", "per_image")
HALVES = (torch.float16, torch.bfloat16)
# Queries x keys x channels of an image from which a call of its own pays on a CPU.
PRODUCTS_PER_CALL = 1_000_000


def check_backend(name: str) -> str:
    """Return the name of an attention back-end if it exists.

    Args:
        name: `auto`, `varlen`, `native`, `padded` or `per_image`.

    Raises:
        ConfigError: It does not exist.
    """
    if name not in BACKENDS:
        raise ConfigError(
            f"attention_backend={name!r} is unknown.{did_you_mean(str(name), BACKENDS)} Use one of "
            f"{list(BACKENDS)}"
        )
    return name


class PackedRows(NamedTuple):
    """Packed queries of a batch and where each of them belongs.

    Args:
        plan: Row plan of `patchreg_ops`.
        counts: Queries of every image; None in a padded plan, and a compiler does not know them.
        longest: At least as many as any image has queries.
    """

    plan: RowPlan
    counts: list[int] | None
    longest: int

    def image(self) -> Tensor:
        """Return the image of every row.

        Shape:
            Returns [L] int64.
        """
        return self.plan.rows[:, 0]

    def starts(self) -> Tensor:
        """Return the first row of every image, then the number of rows.

        Shape:
            Returns [B + 1] int32.
        """
        if self.plan.starts is not None:
            return self.plan.starts
        return torch.nn.functional.pad(self.plan.lengths.cumsum(0), (1, 0)).to(torch.int32)

    def number(self) -> Tensor:
        """Return the number of every row within its image.

        Shape:
            Returns [L] int64.
        """
        image = self.image()
        count = torch.arange(len(image), device=image.device)
        return count - self.starts().index_select(0, image)


@cache  # Without limit: captured graphs go on reading what they were captured with.
def _key_starts(batch: int, keys: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(0, (batch + 1) * keys, keys, device=device, dtype=torch.int32)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, backend: str = "auto"
) -> Tensor:
    """Let the packed queries of every image look at all keys of that image.

    Source:
        Official `batched_sparse_attention` (evaluation only and without gradient there).

    Args:
        query: Packed queries.
        key: Keys.
        value: Values.
        rows: Where each query belongs.
        backend: `varlen` calls the kernel of PyTorch for sequences of different lengths (CUDA, half
            precision); `native` the kernel of this project (CPU, without gradients); `padded` pads
            the queries to the longest image and drops what the padding saw (any device);
            `per_image` calls once for every image (`padded` under a compiler, which does not know
            the lengths); `auto` takes the fastest. A padded plan has no lengths either, so
            `per_image` pads there.

    Shape:
        query [L, h, d]; key and value [B, h, M, d]; returns [L, h * d].

    Raises:
        ConfigError: `varlen` on a device, in a type or with a torch that has no such kernel; `native` on
            another device than the CPU, or where a gradient is needed.
    """
    if backend == "auto":
        backend = _fastest(query, key, value, rows)
    if backend == "varlen":
        return _varlen(query, key, value, rows)
    if backend == "native":
        return _native(query, key, value, rows)
    if rows.counts is None:
        return _capacity(query, key, value, rows)
    if backend == "per_image" and not torch.compiler.is_compiling():
        return _per_image(query, key, value, rows.counts)
    return _padded(query, key, value, rows)


@cache
def varlen_kernel() -> Any:
    """Return PyTorch's attention for sequences of different lengths, or None before torch 2.10.

    Importing it takes more than a second, which only those pay who have use for it.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@cache
def _takes_window(kernel: Any) -> bool:
    """Whether the kernel knows windows; in its first release it does not."""
    return "window_size" in inspect.signature(kernel).parameters


def _varlen_lack(query: Tensor) -> str:
    """Return what keeps these queries from `varlen`, or nothing."""
    if query.device.type != "cuda":
        return f"the device {query.device.type!r} (CUDA is needed)"
    if query.dtype not in HALVES:
        return f"{query.dtype} (float16 or bfloat16 is needed)"
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        return f"heads of {query.shape[-1]} channels (a multiple of 8 up to 256 is needed)"
    if varlen_kernel() is None:
        return f"torch {torch.__version__} (2.10 or newer is needed)"
    return ""


def _fastest(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows) -> str:
    if query.device.type == "cuda":
        return "padded" if _varlen_lack(query) else "varlen"
    fits = query.dtype == torch.float32 and query.shape[-1] % 16 == 0
    if fits and _native_is_fast() and not _native_lack(query, key, value, rows):
        return "native"
    if (
        query.device.type != "cpu"
        or rows.counts is None
        or len(key) == 1
        or torch.compiler.is_compiling()
    ):
        return "padded"  # One image needs no padding.
    products = query.numel() * key.shape[2]
    return "per_image" if products >= PRODUCTS_PER_CALL * len(key) else "padded"


@cache
def _native_is_fast() -> bool:
    """Whether the kernel is compiled and this machine has the wide registers it is made for."""
    return bool(build_info()["cpu"]) and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _native_lack(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows) -> str:
    """Return what keeps these queries from `native`, or nothing."""
    if query.device.type != "cpu":
        return f"the device {query.device.type!r} (a CPU is needed)"
    if torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value)):
        return "gradients (evaluation without them is needed)"
    if rows.counts is None or torch.compiler.is_compiling():
        return "a padded plan or a compiler (the numbers of queries have to be known)"
    return ""


def _native(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows) -> Tensor:
    lack = _native_lack(query, key, value, rows)
    if lack:
        raise ConfigError(
            f"attention_backend='native' does not work with {lack}; use 'auto', which takes the "
            "fastest one that works"
        )
    return packed_attend(query, key, value, rows.starts())


def _varlen(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows) -> Tensor:
    lack = _varlen_lack(query)
    if lack:
        raise ConfigError(
            f"attention_backend='varlen' does not work with {lack}; use 'auto', which takes the "
            "fastest one that works"
        )
    batch, _, keys, _ = key.shape
    if not torch.compiler.is_compiling() and not len(query):
        return query.flatten(1)  # A compiler does not know the rows, and the kernel takes none too.
    steps = _key_starts(batch, keys, key.device)
    # Keys lie [B, M, ..., h, d] in memory, so packing them copies nothing.
    packed_key, packed_value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (key, value))
    # A window that holds every key is none, and keeps torch >= 2.11 away from cuDNN, which builds
    # its plan anew (tens of milliseconds) whenever the number of rows or the longest image changes.
    reach = max(keys, rows.longest)
    kernel = varlen_kernel()
    window = {"window_size": (reach, reach)} if _takes_window(kernel) else {}
    out = kernel(
        query, packed_key, packed_value, rows.starts(), steps, rows.longest, keys, **window
    )
    return out.flatten(1)


def _per_image(query: Tensor, key: Tensor, value: Tensor, counts: list[int]) -> Tensor:
    if not counts:
        return query.flatten(1)
    parts = zip(counts, query.split(counts), key.split(1), value.split(1), strict=True)
    pieces = [
        attend(part.transpose(0, 1).unsqueeze(0), image_key, image_value)
        .transpose(1, 2)
        .reshape(count, query[0].numel())
        for count, part, image_key, image_value in parts
        if count
    ]
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces) if pieces else query.flatten(1)


def _padded(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows) -> Tensor:
    batch = key.shape[0]
    count, heads, width = query.shape
    # A compiler does not know the row count; padding nothing costs a copy and is right as well.
    padded = torch.compiler.is_compiling() or count != batch * rows.longest
    flat = query.reshape(count, heads * width)
    if padded:
        slot = rows.image() * rows.longest + rows.number()
        flat = flat.new_zeros(batch * rows.longest, heads * width).index_copy(0, slot, flat)
    full = flat.view(batch, rows.longest, heads, width).transpose(1, 2)
    out = attend(full, key, value)
    out = out.transpose(1, 2).reshape(batch * rows.longest, heads * width)
    return out.index_select(0, slot) if padded else out


def _capacity(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows) -> Tensor:
    """Padded attention of a padded plan: no shape depends on how many rows are real."""
    batch, last = key.shape[0], len(query) - 1
    starts = rows.starts()[:-1].long()
    place = torch.arange(rows.longest, device=query.device)
    # What lies behind the rows of an image is some other row: nobody reads what that one sees.
    taken = (starts[:, None] + place).clamp(max=last)
    full = query.index_select(0, taken.flatten()).unflatten(0, taken.shape)
    out = attend(full.transpose(1, 2), key, value).transpose(1, 2).flatten(0, 1).flatten(1)
    slot = rows.image() * rows.longest + rows.number()
    return out.index_select(0, slot.clamp(max=batch * rows.longest - 1))
