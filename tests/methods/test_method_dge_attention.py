"""All ways in which packed queries attend give the same result."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from dge_helpers import classifier, error, spread_routers
from patchreg_ops import RowPlan
from torch import Tensor

from patchreg.methods.dge import attention
from patchreg.methods.dge.attention import PackedRows, check_backend, packed_attention
from patchreg.registry import MODELS
from patchreg.utils.errors import ConfigError

HEADS, WIDTH, KEYS = 3, 8, 10


def rows_of(counts: list[int], device: str = "cpu") -> PackedRows:
    """Rows of images with these numbers of queries."""
    lengths = torch.tensor(counts, dtype=torch.int64, device=device)
    image = torch.arange(len(counts), device=device).repeat_interleave(lengths)
    rows = torch.stack((image, *[torch.zeros_like(image)] * 3), dim=1)
    return PackedRows(RowPlan(rows, lengths, None, (1, 1, 0)), counts, max(counts, default=0))


def drawn(
    counts: list[int],
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    keys: int = KEYS,
    width: int = WIDTH,
) -> list[Tensor]:
    """Queries, keys and values, the latter two in the memory layout of the model."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(sum(counts), HEADS, width, generator=generator, dtype=torch.float64)
    pair = torch.randn(len(counts), keys, 2, HEADS, width, generator=generator, dtype=torch.float64)
    query, pair = (value.to(device, dtype).requires_grad_() for value in (query, pair))
    return [query, *pair.permute(2, 0, 3, 1, 4).unbind(0)]


def by_hand(query: Tensor, key: Tensor, value: Tensor, counts: list[int]) -> Tensor:
    """Softmax attention, query by query."""
    out = []
    image = [index for index, count in enumerate(counts) for _ in range(count)]
    for row, index in zip(query, image, strict=True):
        weight = (torch.einsum("hd,hmd->hm", row, key[index]) / WIDTH**0.5).softmax(-1)
        out.append(torch.einsum("hm,hmd->hd", weight, value[index]).flatten())
    return torch.stack(out) if out else query.flatten(1)


COUNTS = [[4, 1, 7], [5, 5], [0, 3, 0, 2], [1], [0, 0], []]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "padded", "per_image"])
def test_backends_equal_the_formula(backend, counts):
    inputs = drawn(counts)
    found = packed_attention(*inputs, rows_of(counts), backend)
    expected = by_hand(*inputs, counts)
    assert found.shape == (sum(counts), HEADS * WIDTH)
    if not sum(counts):
        return
    assert error(found, expected) < 1e-12
    weight = torch.randn(found.shape, dtype=torch.float64)
    got = torch.autograd.grad((found * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    for mine, right in zip(got, wanted, strict=True):
        assert error(mine, right) < 1e-12


def test_varlen_hands_the_kernel_packed_rows_without_copying_keys(monkeypatch):
    # The kernel itself needs CUDA; this checks everything that is handed to it.
    counts = [4, 0, 7]
    query, key, value = drawn(counts)
    calls = []

    def kernel(q, k, v, ends_q, ends_k, longest_q, longest_k, window_size):
        calls.append((k, v))
        # Every query sees every key, also where there are more queries than keys.
        assert min(window_size) >= max(longest_q, longest_k)
        assert ends_q.dtype == ends_k.dtype == torch.int32
        assert ends_q.tolist() == [0, 4, 4, 11]
        assert ends_k.tolist() == [0, 10, 20, 30]
        assert (longest_q, longest_k) == (7, KEYS)
        parts = [
            torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]).div(WIDTH**0.5).softmax(-1)
            @ v[c:d].transpose(0, 1)
            for a, b, c, d in zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True)
        ]
        return torch.cat([part.transpose(0, 1) for part in parts])

    monkeypatch.setattr(attention, "varlen_kernel", lambda: kernel)
    monkeypatch.setattr(attention, "_varlen_lack", lambda query: "")
    found = packed_attention(query, key, value, rows_of(counts), "varlen")
    assert error(found, by_hand(query, key, value, counts)) < 1e-12
    without = lambda q, k, v, eq, ek, lq, lk: kernel(q, k, v, eq, ek, lq, lk, (KEYS, KEYS))  # noqa: E731
    monkeypatch.setattr(attention, "varlen_kernel", lambda: without)  # As in its first release.
    assert torch.equal(packed_attention(query, key, value, rows_of(counts), "varlen"), found)
    assert calls[0][0].data_ptr() == key.data_ptr()
    assert calls[0][1].data_ptr() == value.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("counts", "keys", "width"),
    # The last ones are large enough for what PyTorch would hand over to cuDNN.
    [*((counts, KEYS, WIDTH) for counts in COUNTS), ([200, 26], 257, 64), ([300, 9], 49, 160)],
    ids=str,
)
def test_varlen_equals_padded(counts, keys, width):
    inputs = drawn(counts, torch.bfloat16, "cuda", keys, width)
    rows = rows_of(counts, "cuda")
    found = packed_attention(*inputs, rows, "varlen")
    expected = packed_attention(*inputs, rows, "padded")
    assert found.shape == expected.shape
    if sum(counts):
        assert error(found, expected) < 2e-2
        got = torch.autograd.grad(found.square().sum(), inputs)
        wanted = torch.autograd.grad(expected.square().sum(), inputs)
        for mine, right in zip(got, wanted, strict=True):
            assert error(mine, right) < 5e-2


def test_auto_calls_once_per_image_where_images_are_large(monkeypatch):
    chosen = []
    monkeypatch.setattr(attention, "_native_is_fast", lambda: False)
    monkeypatch.setattr(attention, "_per_image", lambda *args: chosen.append("per_image"))
    monkeypatch.setattr(attention, "_padded", lambda *args: chosen.append("padded"))
    key = torch.zeros(2, 6, 257, 64)
    for counts in ([26, 221], [1, 2]):
        query = torch.zeros(sum(counts), 6, 64)
        packed_attention(query, key, key, rows_of(counts))
    assert chosen == ["per_image", "padded"]


@pytest.mark.parametrize("kind", ["ViT", "pyramid"])
@pytest.mark.parametrize("backend", ["padded", "per_image"])
def test_backbones_hand_the_choice_to_every_block(kind, backend):
    if kind == "ViT":
        model = classifier(attention_backend=backend).backbone
    else:
        model = MODELS.build(
            dict(
                type="DGEPyramidVisionTransformerBackbone",
                arch="tiny",
                img_size=128,
                attention_backend=backend,
            )
        )
    found = [part.backend for part in model.modules() if hasattr(part, "backend")]
    assert len(found) == (3 if kind == "ViT" else 8)
    assert set(found) == {backend}


def test_models_agree(monkeypatch):
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    models = [
        spread_routers(classifier(attention_backend=backend, sparse_train=True)).double()
        for backend in ("padded", "per_image")
    ]
    with torch.no_grad():
        assert error(*[model.eval()(images) for model in models]) < 1e-12
    noise = [torch.randn(3, 2, 2, 3, dtype=torch.float64) for _ in range(3)]
    for model in models:
        model.train().extract(images, noise).tokens.square().sum().backward()
    for (name, one), (_, other) in zip(
        *[model.named_parameters() for model in models], strict=True
    ):
        if one.grad is not None and name != "backbone.blocks.2.attn.kv.bias":
            assert error(one.grad, other.grad) < 1e-10, name


def test_unknown_backend_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"'padedd' is unknown. Did you mean 'padded'\? .*varlen"):
        classifier(attention_backend="padedd")
    assert check_backend("auto") == "auto"


def test_varlen_names_what_it_lacks(monkeypatch):
    inputs = drawn([2, 3])
    rows = rows_of([2, 3])
    with pytest.raises(ConfigError, match="device 'cpu' .*use 'auto'"):
        packed_attention(*inputs, rows, "varlen")
    half = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, shape=(5, 3, 16))
    monkeypatch.setattr(attention, "varlen_kernel", lambda: None)
    assert "2.10 or newer" in attention._varlen_lack(half)
    monkeypatch.setattr(attention, "varlen_kernel", lambda: object())
    assert attention._varlen_lack(half) == ""


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_the_kernel_of_this_project_equals_the_formula(counts):
    inputs = [value.detach() for value in drawn(counts)]
    if not counts:
        return
    found = packed_attention(*(value.float() for value in inputs), rows_of(counts), "native")
    assert found.shape == (sum(counts), HEADS * WIDTH)
    if sum(counts):
        assert error(found.double(), by_hand(*inputs, counts)) < 1e-6


def test_the_kernel_is_taken_in_evaluation_where_it_is_fast(monkeypatch):
    chosen = []
    monkeypatch.setattr(attention, "_native", lambda *args: chosen.append("native"))
    monkeypatch.setattr(attention, "_padded", lambda *args: chosen.append("padded"))
    monkeypatch.setattr(attention, "_native_is_fast", lambda: True)
    query = torch.randn(3, 2, 16)
    key = torch.randn(1, 2, 4, 16)
    packed_attention(query, key, key, rows_of([3]))
    packed_attention(query.requires_grad_(), key, key, rows_of([3]))
    with torch.no_grad():
        packed_attention(query, key, key, rows_of([3]))
        packed_attention(query.double(), key.double(), key.double(), rows_of([3]))
        packed_attention(query[..., :8], key[..., :8], key[..., :8], rows_of([3]))
    monkeypatch.setattr(attention, "_native_is_fast", lambda: False)
    packed_attention(query.detach(), key, key, rows_of([3]))
    assert chosen == ["native", "padded", "native", "padded", "padded", "padded"]


def test_the_kernel_refuses_gradients_and_padded_plans():
    inputs, rows = drawn([2, 3]), rows_of([2, 3])
    with pytest.raises(ConfigError, match="does not work with gradients"):
        packed_attention(*inputs, rows, "native")
    with torch.no_grad(), pytest.raises(ConfigError, match="padded plan"):
        packed_attention(*inputs, rows._replace(counts=None), "native")
