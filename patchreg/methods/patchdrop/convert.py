"""Checkpoints of the PatchDrop repository, both ways.

`official` files are dicts: a classifier under `state_dict` (stage 0); a policy under `agent`
(stage 1), with the high-resolution classifier under `resnet_hr` (stage 2) or `resnet` (stage 3). In
`ours`, a classifier lies on the top level (`backbone.`, `head.`), and the parts of a
PatchDropClassifier below `selector.` and `classifier.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from patchreg.registry import MODELS
from patchreg.utils.errors import CheckpointError, ConfigError
from patchreg.utils.weights import state_dict_of

LAYOUTS = {
    "ours": "this project's model",
    "official": "the PatchDrop repository's files, of all four stages and of its first version",
}
"""Layouts that `convert` reads and writes, with what they are."""

ALLOWED: tuple[type, ...] = ()
"""Classes of plain values in the authors' files."""

OPTIONS: dict[str, dict[str, Any]] = {
    "--stage": dict(
        type=int,
        choices=(1, 2, 3),
        help="stage of the official file to write (default 2; 1 without a classifier)",
    ),
    "--stage3-key": dict(
        action="store_true", help="write the classifier under the official stage-3 key 'resnet' too"
    ),
}
"""Flags of tools/convert.py, which become the keyword arguments of `convert`."""

NUMBERS = ("epoch", "acc", "reward")
AGENTS = ("agent", "net")
CLASSIFIERS = ("resnet_hr", "resnet")
_BUILT = ("type", "depth", "num_blocks", "base_channels", "model_name", "output")
_DS = re.compile(r"ds\.(\d)\.")
_BLOCKS = re.compile(r"blocks\.(\d)\.")
_LAYER = re.compile(r"layer(\d)\.(0\.downsample\.)?")


def convert(
    loaded: dict[str, Any],
    path: str,
    to: str,
    layout: str = "auto",
    *,
    stage: int | None = None,
    stage3_key: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turn a loaded checkpoint into one of the other layout.

    Source:
        Saving and loading of the four scripts of the PatchDrop repository.

    Args:
        loaded: What `patchreg.utils.weights.load_file` returned.
        path: Where it came from, for messages.
        to: Layout wanted.
        layout: Layout of `loaded`, or `auto`.
        stage: Stage of the official file to write, 1 to 3.
        stage3_key: Write the classifier under `resnet` too.

    Returns:
        The new checkpoint, and the report.

    Raises:
        CheckpointError: It is no PatchDrop checkpoint, or a network that cannot be built.
        ConfigError: Options that do not fit together.
    """
    found = "official" if _is_official(loaded) else "ours"
    if layout not in ("auto", found):
        raise ConfigError(f"--from {layout}, but '{path}' has the layout '{found}'")
    if to == "ours" and (stage or stage3_key):
        raise ConfigError("--stage and --stage3-key are for --to official")
    parts = _official_parts(loaded, path) if found == "official" else _our_parts(loaded, path)
    left = parts.pop("", {})
    numbers = {
        key: float(value) if key != "epoch" else int(value)
        for key in NUMBERS
        for value in [loaded.get(key, loaded.get("meta", {}).get(key))]
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    }
    if "epoch" in numbers and "epoch" not in loaded and "iter" in loaded.get("meta", {}):
        # A run counts finished epochs, the official files name the last one.
        numbers["epoch"] = max(numbers["epoch"] - 1, 0)
    missing, unexpected = _compare(parts, path)
    if to == "ours":
        checkpoint = _write_ours(parts, numbers)
    else:
        checkpoint = _write_official(parts, numbers, stage, stage3_key, path)
    report: dict[str, Any] = {
        "from": found,
        "to": to,
        "used": [f"{name}{key}" for name, part in parts.items() for key in part],
        "missing": missing,
        "unexpected": unexpected,
        "not_carried": [*left, *(key for key in loaded if key in ("optimizer", "message_hub"))],
        "model": {
            name.rstrip(".") or "classifier": _describe(part, path) for name, part in parts.items()
        },
    }
    return checkpoint, report


def _is_official(loaded: Mapping[str, Any]) -> bool:
    if any(isinstance(loaded.get(key), Mapping) for key in AGENTS):
        return True
    state = loaded.get("state_dict", loaded)
    names = [key.removeprefix("module.") for key in state]
    return "conv1.weight" in names


def _strip(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Remove the prefix of data parallel."""
    return {key.removeprefix("module."): value for key, value in state.items()}


def _official_parts(loaded: Mapping[str, Any], path: str) -> dict[str, dict[str, Tensor]]:
    agent = next((loaded[key] for key in AGENTS if isinstance(loaded.get(key), Mapping)), None)
    if agent is None:
        return {
            "": {},
            "classifier.": from_official(_strip(state_dict_of(dict(loaded), path)), path),
        }
    parts = {"": {}, "selector.": from_official(_strip(agent), path, policy=True)}
    for key in CLASSIFIERS:
        if isinstance(loaded.get(key), Mapping):
            parts["classifier."] = from_official(_strip(loaded[key]), path)
            break
    return parts


def _our_parts(loaded: dict[str, Any], path: str) -> dict[str, dict[str, Tensor]]:
    state = state_dict_of(loaded, path)
    if not any(key.startswith("selector.") for key in state):
        return {"": {}, "classifier.": dict(state)}
    parts: dict[str, dict[str, Tensor]] = {"": {}}
    for key, value in state.items():
        for name in ("selector.", "classifier."):
            if key.startswith(name):
                parts.setdefault(name, {})[key[len(name) :]] = value
                break
        else:
            parts[""][key] = value
    return parts


def from_official(
    state: Mapping[str, Tensor], path: str, policy: bool = False
) -> dict[str, Tensor]:
    """Rename the keys of one official network.

    Args:
        state: Its state dict, without a `module.` prefix.
        path: Where it came from, for messages.
        policy: Whether it is a policy network; its last layer is `logit`.

    Raises:
        CheckpointError: It is none of the repository's networks, or its broken 224-px one.
    """
    last = "logit." if policy else "head.head."
    stem = state.get("conv1.weight", state.get("features.conv1.weight"))
    if stem is None:
        raise CheckpointError(
            f"'{path}' holds no network of the PatchDrop repository: there is no conv1.weight among "
            f"{sorted(state)[:4]}"
        )
    if stem.shape[-1] == 7 and "linear.weight" in state:
        raise CheckpointError(
            f"'{path}' holds the 224-px network of the released factory, a CIFAR network with a 7x7 "
            "stride-1 stem, which cannot classify 224-px images; train the torchvision ResNet of "
            "configs/patchdrop instead"
        )
    large = stem.shape[-1] == 7
    found = {}
    for key, value in state.items():
        name = key.removeprefix("features.")
        if name.startswith(("linear.", "fc.", "logit.")):
            found[last + name.split(".", 1)[1]] = value
        elif name.startswith("vnet."):
            found["value." + name.split(".", 1)[1]] = value
        elif large:
            name = _DS.sub(lambda match: f"layer{int(match[1]) + 1}.0.downsample.", name)
            name = _BLOCKS.sub(lambda match: f"layer{int(match[1]) + 1}.", name)
            found["backbone.model." + name] = value
        else:
            found["backbone." + name] = value
    return found


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of one of our networks; the inverse of `from_official`.

    Args:
        state: State dict of a classifier or of a policy.
    """
    thin = any(key.startswith("backbone.blocks.") for key in state)
    large = any(key.startswith("backbone.model.") for key in state)
    legacy = "value.weight" in state
    found = {}
    for key, value in state.items():
        name = key.removeprefix("backbone.").removeprefix("model.")
        if key.startswith(("head.head.", "logit.")):
            last = "logit." if legacy else "fc." if thin or large else "linear."
            name = last + key.rsplit(".", 1)[1]
        elif key.startswith("value."):
            name = "vnet." + key.rsplit(".", 1)[1]
        elif legacy and large:
            name = "features." + _LAYER.sub(_legacy_name, name)
        elif legacy:
            name = "features." + name
        found[name] = value
    if "conv1.weight" not in found and "features.conv1.weight" not in found:
        raise CheckpointError(
            "the PatchDrop repository has ResNets only, and this network is none: its weights begin with "
            f"{sorted(state)[:3]}"
        )
    return found


def _compare(parts: Mapping[str, Mapping[str, Tensor]], path: str) -> tuple[list[str], list[str]]:
    """Return what the networks of a file lack, and what they have besides."""
    missing, unexpected = [], []
    for name, part in parts.items():
        described = _describe(part, path)
        kind = {key: described[key] for key in _BUILT if key in described}
        if "type" not in kind:
            continue
        with torch.device("meta"):
            built = MODELS.build(dict(kind, num_classes=0) if "model_name" in kind else kind)
        names = (f"backbone.{key}" for key in built.state_dict())
        # Files of before PyTorch 0.4.1 do not count the batches of BatchNorm.
        expected = {key for key in names if key in part or not key.endswith("num_batches_tracked")}
        found = {key for key in part if key.startswith("backbone.")}
        missing += [f"{name}{key}" for key in sorted(expected - found)]
        unexpected += [f"{name}{key}" for key in sorted(found - expected)]
    return missing, unexpected


def _legacy_name(match: re.Match[str]) -> str:
    segment = int(match[1]) - 1
    return f"ds.{segment}." if match[2] else f"blocks.{segment}."


def _write_ours(
    parts: Mapping[str, Mapping[str, Tensor]], numbers: dict[str, Any]
) -> dict[str, Any]:
    alone = "selector." not in parts
    state = {
        ("" if alone else name) + key: value
        for name, part in parts.items()
        for key, value in part.items()
    }
    return {"state_dict": state, "meta": numbers}


def _write_official(
    parts: Mapping[str, Mapping[str, Tensor]],
    numbers: dict[str, Any],
    stage: int | None,
    stage3_key: bool,
    path: str,
) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {
        key: value if key == "epoch" else torch.tensor(value) for key, value in numbers.items()
    }
    if "selector." not in parts:
        if stage is not None or stage3_key:
            raise ConfigError(f"'{path}' is a classifier alone (stage 0); leave --stage out")
        return {"state_dict": to_official(parts["classifier."]), **checkpoint}
    checkpoint["agent"] = to_official(parts["selector."])
    if stage == 1 or "classifier." not in parts:
        if "classifier." in parts and stage3_key:
            raise ConfigError(
                "--stage3-key is for a classifier, which files of stage 1 do not hold"
            )
        if stage not in (None, 1) or stage3_key:
            raise ConfigError(f"'{path}' has no classifier, which stage {stage or 3} needs")
        return checkpoint
    checkpoint["resnet_hr"] = to_official(parts["classifier."])
    if stage3_key:
        checkpoint["resnet"] = checkpoint["resnet_hr"]
    return checkpoint


def _describe(state: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """Return what a config has to say to build a network."""
    last = next((state[key] for key in ("head.head.weight", "logit.weight") if key in state), None)
    if last is None:
        raise CheckpointError(f"'{path}' has no classification layer (head.head or logit)")
    found: dict[str, Any] = {"outputs": last.shape[0], "in_channels": last.shape[1]}
    if "value.weight" in state:
        found["value_outputs"] = state["value.weight"].shape[0]
    names = list(state)
    if any(key.startswith("backbone.blocks.") for key in names):
        blocks = {key.split(".")[3] for key in names if key.startswith("backbone.blocks.0.")}
        found.update(type="ThinCIFARResNetBackbone", depth=6 * len(blocks) + 2)
        return found
    start = "backbone.model." if any("backbone.model." in key for key in names) else "backbone."
    counts = [
        len(
            {
                key[len(start) :].split(".")[1]
                for key in names
                if key.startswith(f"{start}layer{i}.")
            }
        )
        for i in range(1, 5)
    ]
    if start + "conv1.weight" not in state or not any(counts):
        return found | {"layout": "unknown"}
    if start == "backbone.":
        width = state["backbone.conv1.weight"].shape[0]
        found.update(type="CIFARResNetBackbone", num_blocks=tuple(counts), base_channels=width)
    elif counts == [1, 1, 1, 1]:
        found.update(type="PatchDropResNet10Backbone")
    else:
        bottleneck = any(".conv3." in key for key in names)
        depth = 3 * sum(counts) + 2 if bottleneck else 2 * sum(counts) + 2
        found.update(type="TorchvisionBackbone", model_name=f"resnet{depth}", output="tokens")
    return found
