"""What checkpoints of the pyramid models say about the model; used by `convert`, on official names.

Letters: C channels, h heads, P points.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from patchreg.models.backbones.pvt import ARCHITECTURES, PATCH_SIZES
from patchreg.models.layers import resize_pos_embed

ANCHOR = "patch_embed1.proj.weight"


def holds_pyramid(names: Mapping[str, Any]) -> bool:
    """Tell whether official names are those of a PVT, PVT-DGE or DPVT.

    Args:
        names: State dict, or anything keyed like one.
    """
    return ANCHOR in names


def is_sampled(state: Mapping[str, Tensor]) -> bool:
    """Tell whether the model is a DPVT.

    Args:
        state: State dict of a pyramid.
    """
    return "block1.0.attn.v.weight" in state


def stages(state: Mapping[str, Tensor]) -> range:
    """Return the numbers of the stages, from 1.

    Args:
        state: State dict of a pyramid.
    """
    found = {int(m[1]) for key in state if (m := re.match(r"patch_embed(\d)\.", key))}
    return range(1, max(found) + 1)


def lacking(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names without which the rest cannot be read.

    Args:
        state: State dict of a pyramid.
    """
    basic = {"patch_embed{}.proj.weight": 4, "pos_embed{}": 3, "block{}.0.mlp.fc1.weight": 2}
    names = {name.format(s): ndim for s in stages(state) for name, ndim in basic.items()}
    return [n for n, ndim in names.items() if n not in state or state[n].ndim != ndim] + (
        ["patch_embed stages"] if len(stages(state)) > len(PATCH_SIZES) else []
    )


def widths(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the channels of every stage.

    Args:
        state: State dict of a pyramid.
    """
    return tuple(len(state[f"patch_embed{stage}.proj.weight"]) for stage in stages(state))


def grid(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the last stage's grid, as one row if it is no square.

    Args:
        state: State dict of a pyramid.
    """
    cells = state[f"pos_embed{stages(state)[-1]}"].shape[1] - ("cls_token" in state)
    side = math.isqrt(max(cells, 1))
    return (side, side) if side * side == cells else (1, cells)


def stride(state: Mapping[str, Tensor]) -> int:
    """Return the px per side of a token of the last stage.

    Args:
        state: State dict of a pyramid.
    """
    return math.prod(PATCH_SIZES[: len(stages(state))])


def backbone_config(
    state: Mapping[str, Tensor], size: tuple[int, int] | None, splits: tuple[int, ...] | None
) -> dict[str, Any]:
    """Read the config of a backbone off its shapes.

    Heads (and points) come from the published model of the same sizes; else they are None.

    Args:
        state: State dict of a pyramid.
        size: Height and width in px, or None for what the position embedding says.
        splits: Candidates of the routers, or None for a model without.
    """
    numbers, dims = stages(state), widths(state)
    depths = tuple(
        1 + max(int(m[1]) for key in state if (m := re.match(rf"block{stage}\.(\d+)\.", key)))
        for stage in numbers
    )
    ratios, reductions = [], []
    for stage, width in zip(numbers, dims, strict=True):
        ratio = len(state[f"block{stage}.0.mlp.fc1.weight"]) / width
        ratios.append(int(ratio) if ratio == int(ratio) else ratio)
        conv = state.get(f"block{stage}.0.attn.sr.weight")
        reductions.append(1 if conv is None else conv.shape[-1])
    arch: Any = {
        "depths": depths,
        "embed_dims": dims,
        "num_heads": None,
        "mlp_ratios": tuple(ratios),
        "sr_ratios": tuple(reductions),
    }
    sampled = is_sampled(state)
    heads = None
    for name, known in ARCHITECTURES.items():
        ignored = {"num_heads", "sr_ratios"} if sampled else {"num_heads"}
        if all(known[key] == value for key, value in arch.items() if key not in ignored):
            arch, heads = name, known["num_heads"]
            break
    unit = stride(state)
    rows, columns = (size[0] // unit, size[1] // unit) if size else grid(state)
    kind = "DGEDeformablePyramid" if sampled else "PyramidVisionTransformer"
    config: dict[str, Any] = {
        "type": ("DGE" if splits else "") + kind + "Backbone",
        "arch": arch,
        "img_size": [rows * unit, columns * unit],
        "in_channels": state[ANCHOR].shape[1],
        "qkv_bias": f"block1.0.attn.{'v' if sampled else 'q'}.bias" in state,
    }
    if sampled:
        pairs = len(state["block1.0.attn.attn_weight.weight"])
        config["num_points"] = pairs // heads[0] if heads else None
    else:
        config["cls_token"] = "cls_token" in state
    if "norm.weight" not in state:
        config["out_indices"] = [stage - 1 for stage in numbers]
    if splits:
        config["splits"] = list(splits)
        config["region_padding"] = bool(rows % max(splits) or columns % max(splits))
    return config


def buildable(config: dict[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fill in some heads where the shapes do not tell them, to build a model of the same shapes.

    Args:
        config: Result of `backbone_config`.
        state: State dict it was read off.
    """
    if isinstance(config["arch"], str):
        return config
    heads = [1] * len(stages(state))
    if is_sampled(state):
        pairs = [len(state[f"block{stage}.0.attn.attn_weight.weight"]) for stage in stages(state)]
        points = math.gcd(*pairs)  # A multiple of the true number, so the heads still divide C.
        config = {**config, "num_points": points}
        heads = [pair // points for pair in pairs]
    return {**config, "arch": {**config["arch"], "num_heads": heads}}


def block_order(names: Mapping[str, Any]) -> list[str]:
    """Return the blocks as `block1.0` or `blocks.0`, in execution order; also for a plain DeiT.

    Args:
        names: State dict, or anything keyed like one.
    """
    found = {m[0] for key in names if (m := re.match(r"block(s|\d)\.\d+(?=\.)", key))}
    return sorted(found, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def resize(state: dict[str, Tensor], size: Sequence[int], changed: list[str]) -> None:
    """Resize the position embeddings of all stages, in place.

    Args:
        state: State dict of a pyramid for square images.
        size: Height and width in px.
        changed: Gets a line for every embedding.
    """
    last, unit = stages(state)[-1], stride(state)
    side = grid(state)[0]
    for stage in stages(state):
        factor = unit // math.prod(PATCH_SIZES[:stage])
        old = (side * factor, side * factor)
        new = (size[0] // unit * factor, size[1] // unit * factor)
        extra = int(stage == last and "cls_token" in state)
        name = f"pos_embed{stage}"
        state[name] = resize_pos_embed(state[name], old, new, extra, mode="bilinear")
        changed.append(f"{name}: {old[0]} x {old[1]} -> {new[0]} x {new[1]} cells, bilinear")
