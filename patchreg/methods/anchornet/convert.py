"""Checkpoints of the authors, both ways: the localiser, and the downstream networks.

Layouts: `official` is a bare state dict (`anchornet.pth`, torchvision's files, old DenseNet names
included) or a dict with `net`, `acc`, `epoch`, `optimizer` (the `.pth.tar` files); `ours` puts the
localiser below `backbone.` and `head.fc.`, a downstream network below `backbone.model.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from patchreg.methods.anchornet.trunk import OFFICIAL_BLOCKS
from patchreg.models.backbones.torchvision import TorchvisionBackbone, modern_keys
from patchreg.registry import MODELS
from patchreg.utils.errors import CheckpointError, ConfigError
from patchreg.utils.weights import container_of, state_dict_of

LAYOUTS = {
    "ours": "this project's localiser or downstream network",
    "official": "the authors' files: a bare state dict, or a dict with net, acc, epoch, optimizer",
}
"""Layouts that `convert` reads and writes, with what they are."""

ALLOWED: tuple[type, ...] = ()
"""The authors' files hold plain values only."""

OPTIONS: dict[str, dict[str, Any]] = {
    "--arch": dict(
        metavar="NAME",
        help="torchvision name of a downstream network (default: found from its keys)",
    ),
}
"""Flags of tools/convert.py, which become the keyword arguments of `convert`."""

UNUSED = re.compile(r"bneck\.0\.(conv1|bn1)\.")
"""The expansion of the first block, which the official model has and never uses."""

ARCHITECTURES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext50_32x4d",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
)
"""Downstream networks of the official repository."""

_KEPT = ("acc", "epoch", "optimizer")
_SHOWN = 4


def anchor_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official localiser's weights and leave out those that it never uses.

    Args:
        state: Weights by official name.
    """
    return {
        f"head.{key}" if key.startswith("fc.") else f"backbone.{key}": value
        for key, value in state.items()
        if not UNUSED.match(key)
    }


def anchor_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the localiser's weights in the official order and re-create those that are never used.

    Args:
        state: Weights by this project's name.
    """
    found = {re.sub(r"^(backbone|head)\.", "", key): value for key, value in state.items()}
    official: dict[str, Tensor] = {}
    for key, value in found.items():
        if key.startswith("bneck.0.conv2."):
            official |= _unused(found["conv1.weight"])
        official[key] = value
    return official


def _unused(like: Tensor) -> dict[str, Tensor]:
    """Return the identity as the expansion of the first block; its values reach no output."""
    width = len(like)
    eye = torch.eye(width, dtype=like.dtype).reshape(width, width, 1, 1)
    ones, zeros = like.new_ones(width), like.new_zeros(width)
    parts = {"weight": ones, "bias": zeros, "running_mean": zeros, "running_var": ones}
    norm = {f"bneck.0.bn1.{name}": value.clone() for name, value in parts.items()}
    return {
        "bneck.0.conv1.weight": eye,
        **norm,
        "bneck.0.bn1.num_batches_tracked": torch.tensor(0),
    }


def convert(
    loaded: dict[str, Any], path: str, to: str, layout: str = "auto", *, arch: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turn a loaded checkpoint into the other layout.

    Source:
        Section 'checkpoints' of the official README; loaders of its training scripts.

    Args:
        loaded: What `patchreg.utils.weights.load_file` returned.
        path: Where it came from, for messages.
        to: Layout wanted.
        layout: Layout of `loaded`, or `auto`.
        arch: torchvision's name of a downstream network, or None to find it from its keys.

    Returns:
        The new checkpoint, and the report.

    Raises:
        CheckpointError: The weights are neither a localiser nor one of the downstream networks, or
            not complete.
        ConfigError: `layout` is not the layout of the file.
    """
    source = state_dict_of(loaded, path)
    # A patch stage never stores its localiser; a copy of it made otherwise is left out.
    state = {key: value for key, value in source.items() if not key.startswith("anchor.")}
    ours = any(key.startswith("backbone.") for key in state)
    found = "ours" if ours else "official"
    if layout not in ("auto", found):
        raise ConfigError(f"--from {layout}, but '{path}' has the layout '{found}'")
    is_anchor = any(re.match(r"(backbone\.)?bneck\.", key) for key in state)
    if is_anchor:
        official = anchor_to_official(state) if ours else dict(state)
        model = _check_anchor(official, path)
        renamed = anchor_from_official(official)
    else:
        official = _downstream_names(state, ours, path)
        model = _check_downstream(official, path, arch)
        renamed = {f"backbone.model.{key}": value for key, value in official.items()}
    kept = _kept(loaded, ours)
    bare = is_anchor and not kept
    checkpoint: dict[str, Any]
    if to == "ours":
        checkpoint = {"state_dict": renamed}
        if kept:
            checkpoint["meta"] = {"official": kept}
    else:
        checkpoint = dict(official) if bare else {"net": official, **kept}
    container = container_of(loaded)
    carried = {container, "meta"} | set(kept) if container else set(loaded)
    unused = [key for key in official if is_anchor and UNUSED.match(key)]
    report = {
        "from": found,
        "to": to,
        "used": [key for key in source if key in state and not UNUSED.match(key)],
        "dropped": [key for key in source if key not in state]
        + (unused if not ours and to == "ours" else []),
        "unexpected": [],
        "missing": [],
        "made": unused if ours and to == "official" else [],
        "changed": [] if ours else _renamed(state, official),
        "not_carried": [key for key in loaded if key not in carried],
        "model": model,
    }
    return checkpoint, report


def _renamed(state: Mapping[str, Tensor], official: Mapping[str, Tensor]) -> list[str]:
    return [f"{old} -> {new}" for old, new in zip(state, official) if old != new]


def _kept(loaded: Mapping[str, Any], ours: bool) -> dict[str, Any]:
    """Return what the authors' file holds beside the weights, so that it survives both ways."""
    if not ours:
        return {key: loaded[key] for key in _KEPT if key in loaded}
    meta = loaded.get("meta")
    kept = meta.get("official") if isinstance(meta, dict) else None
    return dict(kept) if isinstance(kept, dict) else {}


def _downstream_names(state: Mapping[str, Tensor], ours: bool, path: str) -> dict[str, Tensor]:
    if not ours:
        return modern_keys(state)
    start = "backbone.model."
    foreign = [key for key in state if not key.startswith(start)]
    if foreign:
        raise CheckpointError(
            f"'{path}' is no torchvision network with its own classifier (it holds {foreign[:_SHOWN]}); only "
            "such networks have an official layout"
        )
    return {key[len(start) :]: value for key, value in state.items()}


def _compare(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return what does not fit, by kind."""
    return {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "other shapes": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ],
    }


def _told(wrong: Mapping[str, list[str]]) -> str:
    return "; ".join(
        f"{what}: {', '.join(names[:_SHOWN])}" + (" ..." if len(names) > _SHOWN else "")
        for what, names in wrong.items()
        if names
    )


def _check_anchor(official: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """Check that a localiser is complete and has the published blocks; return its config."""
    weight = official.get("fc.weight")
    channels = official.get("exp_conv.weight")
    if weight is None or weight.ndim != 2 or channels is None:
        raise CheckpointError(
            f"'{path}' is no AnchorNet: fc.weight or exp_conv.weight is missing or has another shape"
        )
    backbone = dict(type="AnchorNetBackbone", out_channels=len(channels))
    head = dict(type="AnchorNetCAMHead", num_classes=len(weight), in_channels=len(channels))
    with torch.device("meta"):
        model = MODELS.build(dict(type="AnchorNetClassifier", backbone=backbone, head=head))
    expected = model.state_dict()
    wrong = _compare(anchor_from_official(official), expected)
    if any(wrong.values()):
        raise CheckpointError(
            f"'{path}' is no AnchorNet with the {len(OFFICIAL_BLOCKS)} published blocks: {_told(wrong)}"
        )
    return {"backbone": backbone, "head": head}


def _check_downstream(
    official: Mapping[str, Tensor], path: str, arch: str | None
) -> dict[str, Any]:
    """Check that a downstream network is complete; return its config."""
    classifier = "fc.weight" if "fc.weight" in official else "classifier.weight"
    if classifier not in official or official[classifier].ndim != 2:
        raise CheckpointError(
            f"'{path}' is neither an AnchorNet nor a ResNet or DenseNet of torchvision: it has no "
            f"{classifier} with two dimensions. Known: {', '.join(ARCHITECTURES)}"
        )
    classes = len(official[classifier])
    problems = {}
    for name in [arch] if arch else ARCHITECTURES:
        with torch.device("meta"):
            expected = TorchvisionBackbone(name, classes).model.state_dict()
        counts = {key for key in expected if key.endswith("num_batches_tracked")}
        if not counts & set(official):  # Files of before PyTorch 0.4.1 lack them.
            expected = {key: value for key, value in expected.items() if key not in counts}
        problems[name] = _compare(official, expected)
        if not any(problems[name].values()):
            backbone = dict(type="TorchvisionBackbone", model_name=name, num_classes=classes)
            return {"backbone": backbone}
    nearest = min(problems, key=lambda name: sum(map(len, problems[name].values())))
    raise CheckpointError(
        f"'{path}' is none of the networks {', '.join(problems)}; nearest is {nearest}: "
        f"{_told(problems[nearest])}"
    )
