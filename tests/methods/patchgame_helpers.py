"""Weights of the golden files, models from the official arguments, comparisons."""

from __future__ import annotations

import json
import math
import zlib
from typing import Any

import numpy as np
import torch
from golden_reader import load
from safetensors import safe_open
from torch import Tensor, nn

from patchreg.methods.patchgame.convert import official_name
from patchreg.registry import MODELS

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def uniform01(name: str, count: int) -> np.ndarray:
    """Numbers in [0, 1) that depend on the name alone."""
    with np.errstate(over="ignore"):
        x = (np.uint64(zlib.crc32(name.encode())) << np.uint64(32)) + np.arange(
            count, dtype=np.uint64
        )
        z = x + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float64) / 2.0**24


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight of an official name, as README.md of the golden files defines it."""
    count, last = math.prod(shape), name.split(".")[-1]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if name == "logit_scale":
        return torch.tensor(math.log(1 / 0.07))
    if last == "running_mean":
        low, high = -0.1, 0.1
    elif last in ("running_var", "weight_g"):
        low, high = 0.5, 1.5
    elif name.endswith("embedding.weight"):
        low, high = -1.0, 1.0
    elif last in ("pos_embed", "position_encoding", "cls_token", "pe_symbol"):
        low, high = -0.2, 0.2
    elif len(shape) == 1 and last == "weight":
        low, high = 0.8, 1.2
    elif len(shape) <= 1:
        low, high = -0.1, 0.1
    else:
        bound = math.sqrt(6.0 / (count // shape[0]))
        low, high = -bound, bound
    values = (low + (high - low) * uniform01(name, count)).astype(np.float32)
    return torch.from_numpy(values.reshape(shape))


def filled(module: nn.Module, prefix: str = "") -> Any:
    """Fill a module with the weights of its official names behind a prefix."""
    for name, value in module.state_dict().items():
        value.copy_(fill(prefix + official_name(name), tuple(value.shape)))
    return module


def images(golden: Any, name: str) -> Tensor:
    """Normalised images."""
    return (golden[name].float() / 255 - MEAN) / STD


def cases(name: str, key: str = "cases") -> list[dict[str, Any]]:
    """Cases in the metadata of a golden file."""
    return json.loads(metadata(name)[key])


def metadata(name: str) -> dict[str, str]:
    """Metadata of a golden file."""
    with safe_open(load("patchgame", name).path, framework="pt") as file:
        return file.metadata()


def vit(arch: Any = "tiny", patch_size: int = 32, img_size: int = 224, **kwargs: Any) -> dict:
    """Config of a ViT; the official ones are made for 224 px whatever the images have."""
    return dict(
        type="VisionTransformerBackbone",
        arch=arch,
        img_size=img_size,
        patch_size=patch_size,
        **kwargs,
    )


def model_config(**case: Any) -> dict[str, Any]:
    """Our config from the official arguments."""
    patch = case.get("patch_size", 32)
    drop = case.get("sender_dropout", 0.1)
    sender, receiver = case.get("sender_arch", "resnet"), case.get("receiver_arch", "resnet18")
    ranker = dict(type="PatchGameResNetBackbone", stride=patch)
    inner = vit("tiny", patch, drop_path_rate=drop)
    if sender.startswith("vit"):
        ranker = inner = vit(sender[4:], patch, drop_path_rate=drop)
    backbone = dict(
        type="TorchvisionBackbone",
        model_name=receiver,
        output="features",
        model_kwargs=dict(zero_init_residual=True),
    )
    if receiver.startswith("vit"):
        backbone = vit(receiver[4:], patch, drop_path_rate=0.1)
    image = case.get("image_size", 224)
    return dict(
        type="PatchGamePretrainer",
        backbone=backbone,
        ranker=ranker,
        selector=dict(
            type="RankSelector",
            norm=case.get("sender_norm", "sort"),
            topk=case.get("topk"),
            count=(image // patch) ** 2,
        ),
        symbol=inner if case.get("use_context", True) else None,
        loss=dict(type="ContrastiveLoss"),
        head=dict(out_dim=case.get("receiver_dim", 65536)),
        img_size=image,
        patch_size=patch,
        hidden_dim=case.get("sender_hidden_size", 768),
        drop_rate=drop,
        vocab_size=case.get("vocab_size", 128),
        max_len=case.get("max_len", 1),
        hard=case.get("hard", True),
        temperature=case.get("temperature", 1.0),
        trainable_temperature=case.get("trainable_temperature", False),
        text_dims=case.get("receiver_hidden_size", 192),
        text_heads=case.get("num_heads", 3),
        text_layers=case.get("num_layers", 12),
    )


def build(**case: Any) -> Any:
    """Model from the official arguments."""
    return MODELS.build(model_config(**case))


def parameter(model: nn.Module, name: str) -> nn.Parameter:
    """Parameter by its official name."""
    found = {official_name(key): value for key, value in model.named_parameters()}
    return found[name]


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected magnitude."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def relative(found: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference relative to that of what is expected."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def near(found: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    """Compare element by element, as README.md of the golden files states its tolerances."""
    torch.testing.assert_close(
        found.detach().to(expected.dtype), expected, rtol=rtol, atol=atol, check_device=False
    )
