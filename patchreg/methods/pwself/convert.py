"""Checkpoints of other layouts, both ways.

Layouts: `official` is a training checkpoint of the authors, or a full checkpoint of DINO: `student` and
`teacher` with `backbone.*` and `head.*`, `dino_loss` with the center. `backbone` is the bare backbone
of one branch, as DINO publishes it and as timm names it. `ours` is a checkpoint of this project.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from patchreg.models.backbones.vit import ARCHITECTURES
from patchreg.utils.errors import CheckpointError, ConfigError
from patchreg.utils.weights import state_dict_of

LAYOUTS = {
    "ours": "this project's model: student, teacher and center",
    "official": "the authors' training checkpoint, or a full checkpoint of DINO",
    "backbone": "the bare backbone of one branch: DINO's public weights, timm's names",
}
"""Layouts that `convert` reads and writes, with what they are."""

ALLOWED = (argparse.Namespace,)
"""Classes of plain values in the authors' files."""

OPTIONS: dict[str, dict[str, Any]] = {
    "--branch": dict(
        choices=["teacher", "student"],
        help="branch whose backbone --to backbone writes (default teacher)",
    ),
}
"""Flags of tools/convert.py, which become the keyword arguments of `convert`."""

BRANCHES = ("student", "teacher")
CENTER = "criterion.center"
_WEIGHT_NORM = {
    "last_layer.parametrizations.weight.original0": "last_layer.weight_g",
    "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
}


def convert(
    loaded: dict[str, Any], path: str, to: str, layout: str = "auto", *, branch: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turn a loaded checkpoint into one of another layout.

    A center per prototype alone (DINO's) is repeated for every token; a bare backbone goes to both
    branches.

    Source:
        `save_dict` of the official training, `load_pretrained_weights` of its evaluations.

    Args:
        loaded: What `patchreg.utils.weights.load_file` returned.
        path: Where it came from, for messages.
        to: Layout wanted.
        layout: Layout of `loaded`, or `auto`.
        branch: Branch that the layout `backbone` takes.

    Returns:
        The new checkpoint, and the report: entries of the file used, dropped and unexpected; entries
        of the model missing and made; what was changed or not carried; the config of the model.

    Raises:
        CheckpointError: The file holds no backbone of a ViT, or not what the layout needs.
        ConfigError: Options that do not fit together.
    """
    if branch is not None and to != "backbone":
        raise ConfigError(f"--branch is for --to backbone, not for --to {to}")
    found = _layout(loaded, path)
    if layout not in ("auto", found):
        raise ConfigError(f"--from {layout}, but '{path}' has the layout '{found}'")
    changed: list[str] = []
    names, left = _read(loaded, found, path)
    state: dict[str, Tensor] = {name: value for name, (_, value) in names.items()}
    anchors = [f"{item}.backbone.patch_embed.proj.weight" for item in BRANCHES]
    if not any(anchor in state for anchor in anchors):
        shown = ", ".join(list(state)[:4]) or ", ".join(list(loaded)[:4])
        raise CheckpointError(
            f"'{path}' holds no backbone of a ViT: expected 'patch_embed.proj.weight', alone or behind "
            f"'backbone.' in 'student' or 'teacher'; found {shown}"
        )
    unexpected = [name for name in state if not _known(name)]
    for name in unexpected:
        del state[name]
    _spread_center(state, changed)
    checkpoint, gone = _write(state, loaded, to, branch or "teacher", path)
    report = {
        "from": found,
        "to": to,
        "used": [key for name, (key, _) in names.items() if name in state and name not in gone],
        "dropped": [names[name][0] for name in gone if name in names],
        "unexpected": [names[name][0] for name in unexpected],
        "missing": _missing(state),
        "made": [],
        "changed": changed,
        "not_carried": left,
        "model": _config(state),
    }
    return checkpoint, report


def _layout(loaded: Mapping[str, Any], path: str) -> str:
    if any(isinstance(loaded.get(branch), dict) for branch in BRANCHES):
        return "official"
    state = state_dict_of(dict(loaded), path)
    ours = any(key.startswith(("student.backbone.", "teacher.backbone.")) for key in state)
    return "ours" if ours else "backbone"


def _read(
    loaded: dict[str, Any], layout: str, path: str
) -> tuple[dict[str, tuple[str, Tensor]], list[str]]:
    """Return name of ours -> (name in the file, tensor), and what is not carried over."""
    found: dict[str, tuple[str, Tensor]] = {}
    if layout == "official":
        for branch in BRANCHES:
            for key, value in (loaded.get(branch) or {}).items():
                if isinstance(value, Tensor):
                    inner = _plain_name(key.removeprefix("module."))
                    found[f"{branch}.{inner}"] = (f"{branch}.{key}", value)
        center = (loaded.get("dino_loss") or {}).get("center")
        if isinstance(center, Tensor):
            found[CENTER] = ("dino_loss.center", center)
        return found, [key for key in loaded if key not in (*BRANCHES, "dino_loss", "epoch")]
    state = state_dict_of(loaded, path)
    if layout == "ours":
        return {key: (key, value) for key, value in state.items()}, _beside(loaded)
    for key, value in state.items():
        inner = key.removeprefix("module.").removeprefix("backbone.")
        for branch in BRANCHES:
            found[f"{branch}.backbone.{inner}"] = (key, value)
    return found, _beside(loaded)


def _beside(loaded: Mapping[str, Any]) -> list[str]:
    return [key for key, value in loaded.items() if not isinstance(value, (dict, Tensor))]


def _plain_name(key: str) -> str:
    for new, old in _WEIGHT_NORM.items():
        key = key.replace(new, old)
    return key


def _known(name: str) -> bool:
    """Whether an entry belongs to a ViT, a projection head or the center."""
    if name == CENTER:
        return True
    branch, _, rest = name.partition(".")
    if branch not in BRANCHES:
        return False
    tops = ("backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.proj.")
    tops += ("backbone.blocks.", "backbone.norm.", "head.mlp.", "head.last_layer.")
    return rest.startswith(tops)


def _spread_center(state: dict[str, Tensor], changed: list[str]) -> None:
    center = state.get(CENTER)
    if center is None or center.ndim != 2:
        return
    state[CENTER] = center[:, None].repeat(1, _tokens(state), 1)
    changed.append(
        f"center {tuple(center.shape)} -> {tuple(state[CENTER].shape)}, the same for all tokens"
    )


def _write(
    state: dict[str, Tensor], loaded: Mapping[str, Any], to: str, branch: str, path: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the checkpoint, and the names of ours that are not in it."""
    if to == "ours":
        return {"state_dict": dict(state)}, []
    if to == "backbone":
        start = f"{branch}.backbone."
        taken = {name: value for name, value in state.items() if name.startswith(start)}
        if not taken:
            raise CheckpointError(f"'{path}' holds no {branch}; choose the other --branch")
        bare = {name.removeprefix(start): value for name, value in taken.items()}
        return bare, [name for name in state if name not in taken]
    if not all(any(name.startswith(f"{item}.head.") for name in state) for item in BRANCHES):
        raise CheckpointError(
            f"'{path}' holds no heads, which the layout 'official' has; only --to backbone and --to ours "
            "are possible"
        )
    checkpoint: dict[str, Any] = {
        # The authors wrap the student, and not the teacher.
        "student": {f"module.{name}": value for name, value in _below(state, "student.")},
        "teacher": dict(_below(state, "teacher.")),
        "epoch": int(loaded.get("epoch", (loaded.get("meta") or {}).get("epoch", 0))),
    }
    if CENTER in state:
        tokens = _tokens(state)
        center = state[CENTER]
        if center.shape[1] != tokens:
            # Of `center_mode` 'global' (one) or 'cls_patch' (two); the authors have one per token.
            center = torch.cat((center[:, :1], center[:, -1:].repeat(1, tokens - 1, 1)), dim=1)
        checkpoint["dino_loss"] = {"center": center}
    return checkpoint, []


def _tokens(state: Mapping[str, Tensor]) -> int:
    return next(value for key, value in state.items() if key.endswith("pos_embed")).shape[1]


def _below(state: Mapping[str, Tensor], start: str) -> Iterable[tuple[str, Tensor]]:
    return (
        (key.removeprefix(start), value) for key, value in state.items() if key.startswith(start)
    )


def _missing(state: Mapping[str, Tensor]) -> list[str]:
    parts = [f"{branch}.{part}" for branch in BRANCHES for part in ("backbone", "head")]
    missing = [f"{part}.*" for part in parts if not any(k.startswith(part + ".") for k in state)]
    return missing + ([] if CENTER in state else [CENTER])


def _config(state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Read the config of a model off its shapes.

    Attention heads leave no shape behind: they are known for the published sizes, else None.
    """
    branch = next(item for item in BRANCHES if f"{item}.backbone.pos_embed" in state)
    start = f"{branch}.backbone."
    patch = state[start + "patch_embed.proj.weight"]
    cells = state[start + "pos_embed"].shape[1] - 1
    depth = len({key.split(".")[3] for key in state if key.startswith(start + "blocks.")})
    dims = patch.shape[0]
    name = next(
        (key for key, a in ARCHITECTURES.items() if (a["embed_dims"], a["depth"]) == (dims, depth)),
        None,
    )
    config: dict[str, dict[str, Any]] = {
        "backbone": dict(
            type="VisionTransformerBackbone",
            arch=name or dict(embed_dims=dims, depth=depth, num_heads=None),
            img_size=math.isqrt(cells) * patch.shape[-1],
            patch_size=patch.shape[-1],
            in_channels=patch.shape[1],
            mlp_ratio=len(state[start + "blocks.0.mlp.fc1.weight"]) / dims,
            qkv_bias=start + "blocks.0.attn.qkv.bias" in state,
            pos_resize="dino",
        )
    }
    last = state.get(f"{branch}.head.last_layer.weight_v")
    if last is not None:
        gain = state[f"{branch}.head.last_layer.weight_g"]
        layers = [
            value
            for key, value in state.items()
            if key.startswith(f"{branch}.head.mlp.") and key.endswith("weight") and value.ndim == 2
        ]
        config["head"] = dict(
            type="ProjectionHead",
            in_channels=dims,
            out_dim=last.shape[0],
            num_layers=len(layers),
            hidden_dim=layers[0].shape[0] if len(layers) > 1 else last.shape[1],
            bottleneck_dim=last.shape[1],
            norm_last_layer=bool(torch.equal(gain, torch.ones_like(gain))),
        )
    return config
