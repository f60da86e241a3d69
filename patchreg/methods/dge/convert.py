"""State dicts of other layouts, both ways.

Layouts: `official` is the state dict of vtpack's DeiT and DeiT-DGE (`patch_embed.*`, `blocks.*`,
`head.*`), whose plain DeiT is timm's; ours puts the same names below `backbone.` and `head.`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from patchreg.utils.errors import CheckpointError

HEAD_PARTS = ("head", "head_dist", "pre_logits")


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
        state: State dict of a `DGEClassifier` or `PatchClassifier` with a ViT backbone.

    Raises:
        CheckpointError: A key is neither below `backbone.` nor below `head.`.
    """
    renamed = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part not in ("backbone", "head"):
            raise CheckpointError(
                f"'{key}' has no official name; expected keys below 'backbone.' or 'head.'"
            )
        renamed[rest] = value
    return renamed


def split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the fused qkv projections of a plain DeiT into the separate ones of DGE.

    Routers and `splits` are not in the result: a DGE model loaded with it keeps its fresh ones.

    Args:
        state: State dict in either layout.

    Shape:
        qkv [3 C, ...] becomes q [C, ...] and kv [2 C, ...].
    """
    converted = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            third = len(value) // 3
            converted[key.replace(".qkv.", ".q.")] = value[:third].clone()
            converted[key.replace(".qkv.", ".kv.")] = value[third:].clone()
        else:
            converted[key] = value
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
