"""Checkpoints of other layouts, both ways.

Layouts: `official` is vtpack's DeiT-DGE (`patch_embed.*`, `blocks.*`, `head.*`) or PVT-DGE, `plain`
is a model without routers: a DeiT with one fused qkv projection under the same names (vtpack's and
timm's), or vtpack's PVT or DPVT. `ours` puts either below `backbone.` and `head.`, `backbone` puts
either behind a prefix, for a detector. Between the ends everything is done on official names.

Letters: C channels.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patchreg.methods.dge import convert_pyramid as pyramid
from patchreg.methods.dge.router import DynamicGrainedEncoder, check_splits
from patchreg.models.backbones.vit import ARCHITECTURES
from patchreg.models.layers import init_transformer, resize_pos_embed
from patchreg.registry import MODELS
from patchreg.utils.errors import CheckpointError, ConfigError
from patchreg.utils.weights import container_of, state_dict_of

LAYOUTS = {
    "ours": "this project's model",
    "official": "vtpack's model",
    "plain": "DeiT with fused qkv projections (vtpack, timm), or PVT; routers are dropped",
    "backbone": "vtpack's names behind a prefix, for a detector; other entries are kept",
}
"""Layouts that `convert` reads and writes, with what they are."""

ALLOWED = (argparse.Namespace,)
"""Classes of plain values in the authors' files."""

OPTIONS: dict[str, dict[str, Any]] = {
    "--splits": dict(
        type=int, nargs="+", metavar="S", help="give a plain model fresh routers with these splits"
    ),
    "--num-classes": dict(type=int, metavar="N", help="classes the result must have"),
    "--new-head": dict(action="store_true", help="draw a fresh head with --num-classes classes"),
    "--img-size": dict(
        type=int, nargs="+", metavar="PX", help="side, or height and width: resize pos_embed"
    ),
    "--seed": dict(type=int, metavar="N", help="seed of fresh routers and heads (default 0)"),
    "--ema": dict(action="store_true", help="take the average (model_ema) from vtpack's file"),
    "--prefix": dict(help="prefix of --to backbone (default backbone.bottom_up.model.)"),
}
"""Flags of tools/convert.py, which become the keyword arguments of `convert`."""

PREFIX = "backbone.bottom_up.model."
HEAD_PARTS = ("head", "head_dist", "pre_logits")
KEPT = ("epoch", "args")
ANCHOR = "patch_embed.proj.weight"


def convert(
    loaded: dict[str, Any],
    path: str,
    to: str,
    layout: str = "auto",
    *,
    splits: Sequence[int] | None = None,
    num_classes: int | None = None,
    new_head: bool = False,
    img_size: Sequence[int] | None = None,
    seed: int = 0,
    ema: bool = False,
    prefix: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turn a loaded checkpoint into one of another layout.

    Source:
        Keys of the official models, `--finetune` of the official `main.py` (position embedding,
        head), official `tools/export_model.py` (prefix).

    Args:
        loaded: What `patchreg.utils.weights.load_file` returned.
        path: Where it came from, for messages.
        to: Layout wanted.
        layout: Layout of `loaded`, or `auto`.
        splits: Give a plain model fresh routers with these splits; a DGE model must have them.
        num_classes: Classes that the result must have.
        new_head: Draw a fresh head of `num_classes` classes.
        img_size: Side, or height and width, in px, to resize the position embedding for.
        seed: Seed of what is drawn.
        ema: Take `model_ema` instead of `model`.
        prefix: Prefix of the layout `backbone`.

    Returns:
        The new checkpoint, and the report: entries of the file used, dropped and unexpected;
        entries of the model missing and made, in official names; what was changed or not carried;
        the config of the model.

    Raises:
        CheckpointError: The weights are no complete DeiT, PVT or DPVT, with or without routers, or
            not as the options say.
        ConfigError: Options that do not fit together.
    """
    if prefix is not None and to != "backbone":
        raise ConfigError(f"--prefix is for --to backbone, not for --to {to}")
    if splits is not None and to == "plain":
        raise ConfigError("--splits adds routers, which --to plain drops; use one of the two")
    if new_head and num_classes is None:
        raise ConfigError("--new-head needs --num-classes N")
    if num_classes is not None and num_classes < 1:
        raise ConfigError(f"--num-classes {num_classes}: expected 1 or more")
    changed: list[str] = []
    source = _weights(loaded, path, ema, changed)
    found, names = _official_names(source, path)
    if layout not in ("auto", found):
        raise ConfigError(f"--from {layout}, but '{path}' has the layout '{found}'")
    whole = {name: source[key] for key, name in names.items()}
    extra = _check(whole, path)
    state = {name: value for name, value in whole.items() if name not in extra}
    made: list[str] = []
    dropped: list[str] = []
    if splits is not None:
        state = _add_routers(state, check_splits(splits), seed, path, made)
    elif to == "plain":
        dropped += [name for name in state if ".dge." in name]
        state = without_routers(state) if pyramid.holds_pyramid(state) else merge_qkv(state)
    if num_classes is not None:
        dropped += _set_classes(state, num_classes, new_head, seed, path, made)
    size = None if img_size is None else _resize(state, img_size, path, changed)
    _check(state, path)
    checkpoint, left = _pack(loaded, state, found, to, prefix or PREFIX)
    gone = {*extra, *dropped}
    report = {
        "from": found,
        "to": to,
        "used": [key for key, name in names.items() if name not in gone],
        "dropped": [key for key, name in names.items() if name in dropped],
        "unexpected": [key for key in source if key not in names or names[key] in extra],
        "missing": [] if "head.weight" in state else ["head.weight", "head.bias"],
        "made": made,
        "changed": changed,
        "not_carried": left,
        "model": _config(state, path, size),
    }
    if size is None and len(set(_grid(state))) > 1:
        changed.append("pos_embed is for no square grid: set img_size of the model by hand")
    return checkpoint, report


def official_name(key: str) -> str:
    """Return the official name of an entry of ours.

    Args:
        key: Name below `backbone.` or `head.`.

    Raises:
        CheckpointError: It is neither.
    """
    part, _, rest = key.partition(".")
    if part not in ("backbone", "head"):
        raise CheckpointError(
            f"'{key}' has no official name; expected keys below 'backbone.' or 'head.'"
        )
    return rest


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an official state dict to ours.

    Args:
        state: State dict of vtpack or timm.
    """
    return {
        ("head." if key.split(".", 1)[0] in HEAD_PARTS else "backbone.") + key: value
        for key, value in state.items()
    }


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of ours to the official names.

    Args:
        state: State dict of a `DGEClassifier` or `PatchClassifier` with a ViT or pyramid backbone.

    Raises:
        CheckpointError: A key is neither below `backbone.` nor below `head.`.
    """
    return {official_name(key): value for key, value in state.items()}


def split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the fused qkv projections of a plain DeiT into the separate ones of DGE.

    Routers and `splits` are not in the result: a DGE model loaded with it keeps its fresh ones.

    Args:
        state: State dict in either layout.

    Shape:
        qkv [3 C, ...] becomes q [C, ...] and kv [2 C, ...].
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".attn.qkv." not in key:
            converted[key] = value
        elif key.replace(".qkv.", ".q.") not in converted:
            start = key[: key.index(".qkv.")]
            third = len(value) // 3
            for name, rows in (("q", slice(0, third)), ("kv", slice(third, None))):
                for part in (item for item in state if item.startswith(f"{start}.qkv.")):
                    converted[part.replace(".qkv.", f".{name}.")] = state[part][rows].clone()
    return converted


def merge_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn DGE's query and key/value projections into fused ones; routers and `splits` are dropped.

    Args:
        state: State dict in either layout.

    Shape:
        q [C, ...] and kv [2 C, ...] become qkv [3 C, ...].

    Raises:
        CheckpointError: A query projection has no key/value projection beside it.
    """
    converted = {}
    for key, value in state.items():
        if ".attn.q." in key:
            partner = key.replace(".attn.q.", ".attn.kv.")
            if partner not in state:
                raise CheckpointError(
                    f"'{key}' without '{partner}': not the state dict of a DGE model"
                )
            converted[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat((value, state[partner]))
        elif ".attn.kv." not in key and ".dge." not in key:
            converted[key] = value
    return converted


def without_routers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop routers and `splits`: what is left of a PVT-DGE is a PVT.

    Args:
        state: State dict in either layout.
    """
    return {key: value for key, value in state.items() if ".dge." not in key}


def _weights(loaded: dict[str, Any], path: str, ema: bool, changed: list[str]) -> dict[str, Tensor]:
    state = state_dict_of(loaded, path)
    if not ema:
        return state
    if not isinstance(loaded.get("model_ema"), dict):
        raise CheckpointError(f"--ema: '{path}' holds no average (model_ema); leave --ema out")
    average = state_dict_of({"model": loaded["model_ema"]}, path)
    for key, value in average.items():
        # vtpack averages these integers too and cuts off the fraction: a split may come out wrong.
        if key.endswith("dge.splits") and key in state and not torch.equal(value, state[key]):
            average[key] = state[key]
            changed.append(f"{key}: {value.tolist()} -> {state[key].tolist()}, as in 'model'")
    return average


def _official_names(state: Mapping[str, Tensor], path: str) -> tuple[str, dict[str, str]]:
    ends = (ANCHOR, pyramid.ANCHOR)
    anchors = [key.removesuffix(end) for end in ends for key in state if key.endswith(end)]
    start = anchors[0] if len(anchors) == 1 else ""
    routed, fused = (f"{start}blocks.0.attn.{part}.weight" in state for part in ("q", "qkv"))
    if start + pyramid.ANCHOR in state:
        known = any(f"{start}block1.0.attn.{part}.weight" in state for part in ("q", "v"))
        routed = f"{start}block1.0.dge.router.gate.weight" in state
    else:
        known = routed != fused
    if not anchors or not known:
        raise CheckpointError(
            f"'{path}' is no DeiT or DeiT-DGE: expected '{ANCHOR}' and 'blocks.0.attn.q.weight' or "
            f"'blocks.0.attn.qkv.weight', alone or behind a prefix (a PVT or DPVT: "
            f"'{pyramid.ANCHOR}' and 'block1.0.attn.q.weight' or 'block1.0.attn.v.weight'); found "
            f"{_some(list(state))}"
        )
    if not start:
        return "official" if routed else "plain", {key: key for key in state}
    if start == "backbone." and "backbone.head.weight" not in state:
        return "ours", {key: official_name(key) for key in state}
    names = {key: key.removeprefix(start) for key in state if key.startswith(start)}
    return "backbone", names


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _grid(state: Mapping[str, Tensor]) -> tuple[int, int]:
    if pyramid.holds_pyramid(state):
        return pyramid.grid(state)
    cells = state["pos_embed"].shape[1] - _extra(state)
    side = math.isqrt(max(cells, 1))
    return (side, side) if side * side == cells else (1, cells)


def _extra(state: Mapping[str, Tensor]) -> int:
    return ("cls_token" in state) + ("dist_token" in state)


def _config(
    state: Mapping[str, Tensor], path: str, size: tuple[int, int] | None = None
) -> dict[str, dict[str, Any]]:
    """Read the config of a model off its shapes; they do not tell the number of heads."""
    if pyramid.holds_pyramid(state):
        splits = _splits(state, path) if any(".dge." in key for key in state) else None
        backbone = pyramid.backbone_config(state, size, splits)
    else:
        backbone = _deit_config(state, path, size)
    head = {
        "type": "LinearHead",
        "num_classes": len(state.get("head.weight", ())),
        "in_channels": _width(state),
        "pool": "cls" if "cls_token" in state else "mean",
        "distilled": "head_dist.weight" in state,
        "representation_size": len(state.get("pre_logits.fc.weight", ())) or None,
    }
    return {"backbone": backbone, "head": head}


def _deit_config(
    state: Mapping[str, Tensor], path: str, size: tuple[int, int] | None
) -> dict[str, Any]:
    blocks = {int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key))}
    dims, channels, patch, _ = state[ANCHOR].shape
    depth = max(blocks) + 1
    name = next(
        (key for key, a in ARCHITECTURES.items() if (a["embed_dims"], a["depth"]) == (dims, depth)),
        None,
    )
    routed = "blocks.0.attn.q.weight" in state
    rows, columns = (size[0] // patch, size[1] // patch) if size else _grid(state)
    backbone: dict[str, Any] = {
        "type": ("DGE" if routed else "") + "VisionTransformerBackbone",
        "arch": name or {"embed_dims": dims, "depth": depth, "num_heads": None},
        "img_size": [rows * patch, columns * patch],
        "patch_size": patch,
        "in_channels": channels,
        "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / dims,
        "qkv_bias": f"blocks.0.attn.{'q' if routed else 'qkv'}.bias" in state,
        "cls_token": "cls_token" in state,
        "dist_token": "dist_token" in state,
    }
    if routed:
        backbone["splits"] = list(_splits(state, path))
        region = max(backbone["splits"])
        backbone["region_padding"] = bool(rows % region or columns % region)
    return backbone


def _first(state: Mapping[str, Tensor]) -> Tensor:
    return state[pyramid.ANCHOR if pyramid.holds_pyramid(state) else ANCHOR]


def _width(state: Mapping[str, Tensor]) -> int:
    return pyramid.widths(state)[-1] if pyramid.holds_pyramid(state) else len(state[ANCHOR])


def _splits(state: Mapping[str, Tensor], path: str) -> tuple[int, ...]:
    found = {tuple(value.tolist()) for key, value in state.items() if key.endswith(".dge.splits")}
    if len(found) != 1:
        raise CheckpointError(
            f"'{path}' has {len(found)} different splits {sorted(found)}; expected one entry "
            "'....dge.splits' in every block, the same everywhere"
        )
    return check_splits(found.pop())


def _check(state: Mapping[str, Tensor], path: str) -> set[str]:
    """Compare names and shapes with the model of the same config; return heads it cannot use."""
    if pyramid.holds_pyramid(state):
        lacking = pyramid.lacking(state)
    else:
        basic = ("pos_embed", "blocks.0.mlp.fc1.weight")
        lacking = [name for name in basic if name not in state]
        if not lacking and (state[ANCHOR].ndim != 4 or state["pos_embed"].ndim != 3):
            lacking = [ANCHOR]
    if lacking:
        kind = "PVT, PVT-DGE or DPVT" if pyramid.holds_pyramid(state) else "DeiT or DeiT-DGE"
        raise CheckpointError(f"'{path}' is no {kind}: check {_some(lacking)}")
    config = _config(state, path)
    backbone, head = config["backbone"], config["head"]
    if pyramid.holds_pyramid(state):
        backbone = pyramid.buildable(backbone, state)
    elif isinstance(backbone["arch"], dict):
        backbone = {**backbone, "arch": {**backbone["arch"], "num_heads": 1}}
    headless = not head["num_classes"]
    head = {**head, "num_classes": head["num_classes"] or 1}
    with torch.device("meta"):
        model = MODELS.build({"type": "PatchClassifier", "backbone": backbone, "head": head})
    expected = to_official(model.state_dict())
    if headless:
        expected = {k: v for k, v in expected.items() if k.split(".")[0] not in HEAD_PARTS}
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    foreign = [name for name in unexpected if name.split(".")[0] not in HEAD_PARTS]
    shapes = [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if missing or foreign or shapes:
        parts = {"missing": missing, "not in the model": foreign, "other shapes": shapes}
        raise CheckpointError(
            f"'{path}' is no complete {backbone['type'].removesuffix('Backbone')} of this project: "
            + "; ".join(f"{what}: {_some(names)}" for what, names in parts.items() if names)
        )
    return set(unexpected)


def _add_routers(
    state: dict[str, Tensor], splits: tuple[int, ...], seed: int, path: str, made: list[str]
) -> dict[str, Tensor]:
    if any(".dge." in name for name in state):
        own = _splits(state, path)
        if own != splits:
            raise CheckpointError(
                f"'{path}' has routers for splits {list(own)}, --splits asks for {list(splits)}; "
                "routers cannot be changed: leave --splits out, or make a plain model first with "
                "--to plain and give that fresh routers"
            )
        return state
    if pyramid.holds_pyramid(state) and pyramid.is_sampled(state):
        raise CheckpointError(f"'{path}' is a DPVT, which has no routers; leave --splits out")
    dtype, order = _first(state).dtype, pyramid.block_order(state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = {
            block: DynamicGrainedEncoder(len(state[f"{block}.norm1.weight"]), splits).state_dict()
            for block in order
        }
    converted = {}
    for name, value in split_qkv(state).items():
        converted[name] = value
        if name.endswith(".mlp.fc2.bias"):
            block = name.removesuffix(".mlp.fc2.bias")
            for part, drawn in fresh[block].items():
                kind = dtype if drawn.is_floating_point() else drawn.dtype
                converted[f"{block}.dge.{part}"] = drawn.to(kind)
    made += [name for name in converted if ".dge." in name]
    return converted


def _set_classes(
    state: dict[str, Tensor], classes: int, new_head: bool, seed: int, path: str, made: list[str]
) -> list[str]:
    old = state.get("head.weight")
    if old is not None and not new_head:
        if len(old) != classes:
            raise CheckpointError(
                f"'{path}' has a head for {len(old)} classes, --num-classes asks for {classes}; "
                "give --new-head to replace it by a fresh one"
            )
        return []
    if "norm.weight" not in state:
        raise CheckpointError(
            f"'{path}' has no final norm: it is a backbone that gives maps, and cannot get a head"
        )
    heads = [part for part in ("head", "head_dist") if f"{part}.weight" in state]
    heads = heads or (["head", "head_dist"] if "dist_token" in state else ["head"])
    width = _width(state) if old is None else old.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in heads:
            layer = nn.Linear(width, classes)
            init_transformer(layer)
            for name, value in layer.state_dict().items():
                state[f"{part}.{name}"] = value.to(_first(state).dtype)
                made.append(f"{part}.{name}")
    return (
        [] if old is None else [f"{part}.{name}" for part in heads for name in ("weight", "bias")]
    )


def _resize(
    state: dict[str, Tensor], img_size: Sequence[int], path: str, changed: list[str]
) -> tuple[int, int]:
    is_pyramid = pyramid.holds_pyramid(state)
    patch = pyramid.stride(state) if is_pyramid else state[ANCHOR].shape[-1]
    size = tuple(img_size) * 2 if len(img_size) == 1 else tuple(img_size)
    if len(size) != 2 or any(side < patch or side % patch for side in size):
        raise ConfigError(
            f"--img-size {' '.join(map(str, img_size))}: expected one or two multiples of {patch}"
        )
    old, new = _grid(state), (size[0] // patch, size[1] // patch)
    if old[0] != old[1] and new[0] * new[1] != old[1]:
        raise CheckpointError(
            f"the position embedding of '{path}' has {old[1]} cells, which is no square, so its "
            "grid is not known and it cannot be resized"
        )
    if old[0] == old[1] and old != new and is_pyramid:
        pyramid.resize(state, size, changed)
    elif old[0] == old[1] and old != new:
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], old, new, _extra(state))
        changed.append(f"pos_embed: {old[0]} x {old[1]} -> {new[0]} x {new[1]} cells, bicubic")
    return size[0], size[1]


def _pack(
    loaded: dict[str, Any], state: dict[str, Tensor], found: str, to: str, prefix: str
) -> tuple[dict[str, Any], list[str]]:
    container = container_of(loaded)
    entries = {} if container is None else {k: v for k, v in loaded.items() if k != container}
    others = {key: _plain(value) for key, value in entries.items()}
    if found == "ours":
        meta = others.get("meta")
        official = meta.get("official") if isinstance(meta, dict) else None
        others = official if isinstance(official, dict) else {}
    kept = {key: value for key, value in others.items() if to == "backbone" or key in KEPT}
    left = [key for key in entries if key not in kept and key != "meta"]
    if to == "ours":
        checkpoint: dict[str, Any] = {"state_dict": from_official(state)}
        return (checkpoint | {"meta": {"official": kept}} if kept else checkpoint), left
    if to == "backbone":
        state = {prefix + key: value for key, value in state.items()}
    return {"model": state, **kept}, left


def _plain(value: Any) -> Any:
    """Replace argument namespaces by dicts, which load without an allow-list."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    return {key: _plain(item) for key, item in value.items()} if type(value) is dict else value
