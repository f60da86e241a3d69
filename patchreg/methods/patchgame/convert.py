"""Checkpoints of other layouts, both ways.

Layouts: `official` is a checkpoint of the authors' training, `listener` the bare vision tower under the
names of torchvision or timm, which is what their `eval_knn.py` evaluates, `ours` a checkpoint of this
project. Order of weights and of the optimizer's state is the same in `official` and `ours`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from patchreg.utils.errors import CheckpointError, ConfigError
from patchreg.utils.weights import state_dict_of

LAYOUTS = {
    "ours": "this project's PatchGamePretrainer",
    "official": "the authors' training checkpoint",
    "listener": "the bare vision tower, under torchvision's or timm's names; nothing goes back from it",
}
"""Layouts that `convert` reads and writes, with what they are."""

ALLOWED = (argparse.Namespace,)
"""Classes of plain values in the authors' files."""

OPTIONS: dict[str, dict[str, Any]] = {}
"""Flags of tools/convert.py: none."""

_NETWORKS = ("sender.patch_rank.", "receiver.vision.")
_VIT = ("cls_token", "dist_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
_LAYERS = "receiver.encoder.layers."
_KEPT = ("epoch", "args", "optimizer")
_WEIGHT_NORM = {
    "last_layer.parametrizations.weight.original0": "last_layer.weight_g",
    "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
}


def convert(
    loaded: dict[str, Any], path: str, to: str, layout: str = "auto"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turn a loaded checkpoint into one of another layout.

    Weights go round bit by bit. `optimizer` goes along as it is, `args` as a dict.

    Source:
        `save_dict` of the official `train.py`, `load_listener_weights` of `eval_knn.py`.

    Args:
        loaded: What `patchreg.utils.weights.load_file` returned.
        path: Where it came from, for messages.
        to: Layout wanted.
        layout: Layout of `loaded`, or `auto`.

    Returns:
        The new checkpoint, and the report: entries of the file used, dropped and unexpected; entries of the
        model missing and made; what was changed or not carried; the config of the model.

    Raises:
        CheckpointError: The file holds no PatchGame.
        ConfigError: `layout` is not that of the file.

    Differs from official:
        A file that fits nowhere is an error, there it ends the program with success.
    """
    state = state_dict_of(loaded, path)
    names = {key: official_name(_plain(key)) for key in state}
    if not {"receiver.embedding.weight", "sender.ranker.1.weight"} <= set(names.values()):
        raise CheckpointError(
            f"'{path}' holds no PatchGame: expected 'sender.ranker.1.weight' and "
            f"'receiver.embedding.weight'; found {', '.join(list(state)[:4])}"
        )
    found = "ours" if isinstance(loaded.get("state_dict"), dict) else "official"
    if layout not in ("auto", found):
        raise ConfigError(f"--from {layout}, but '{path}' has the layout '{found}'")
    official = {names[key]: value for key, value in state.items()}
    lost = _lost(official)
    if lost:
        raise CheckpointError(
            f"'{path}' is no whole PatchGame: it lacks {', '.join(lost[:4])}"
            + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        )
    known = {key: name for key, name in names.items() if _known(name)}
    used = known
    if to == "listener":
        start = _NETWORKS[1]
        used = {key: name for key, name in known.items() if name.startswith(start)}
        checkpoint: dict[str, Any] = {
            "model": {name.removeprefix(start): official[name] for name in used.values()}
        }
    elif to == "ours":
        checkpoint = {"state_dict": {our_name(name): official[name] for name in known.values()}}
    else:
        checkpoint = {"model": {f"module.{name}": official[name] for name in known.values()}}
    carried = [] if to == "listener" else [key for key in _KEPT if key in loaded]
    for key in carried:
        value = loaded[key]
        checkpoint[key] = vars(value) if isinstance(value, argparse.Namespace) else value
    weights = "state_dict" if found == "ours" else "model"
    report = {
        "from": found,
        "to": to,
        "used": list(used),
        "dropped": [key for key in known if key not in used],
        "unexpected": [key for key in names if key not in known],
        "missing": [] if "logit_scale" in official else ["logit_scale"],
        "made": [],
        "changed": [],
        "not_carried": [key for key in loaded if key not in carried and key != weights],
        "model": _config(official),
    }
    return checkpoint, report


def official_name(key: str) -> str:
    """Return the official name of an entry of ours.

    Networks of torchvision lie one level deeper here.

    Args:
        key: Name in our state dict, or in that of one of its parts.
    """
    for part in ("patch_rank.", "vision."):
        key = key.replace(f"{part}model.", part)
    return key.removeprefix("model.")


def our_name(name: str) -> str:
    """Return the name of an official entry in our model.

    Args:
        name: Official name, without `module.`.
    """
    for network in _NETWORKS:
        rest = name.removeprefix(network)
        # ViTs have the same names here and there; other networks are torchvision's.
        if rest != name and not rest.startswith(_VIT):
            return f"{network}model.{rest}"
    return name


def _lost(state: Mapping[str, Tensor]) -> list[str]:
    """Return which entries of the official layout, outside the image networks, are not there."""
    layers = {int(name.split(".")[3]) for name in state if name.startswith(_LAYERS)}
    inside = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight")
    inside += ("linear2.weight", "norm1.weight", "norm2.weight")
    expected = [
        f"{_LAYERS}{n}.{part}" for n in range(max(layers, default=0) + 1) for part in inside
    ]
    expected += ["sender.pe_symbol", "gumbel.logits.weight"]
    for head in ("text_fc", "vision_fc"):
        expected += [f"receiver.{head}.last_layer.weight_{part}" for part in "gv"]
    context = "sender.patch_symbol.patch_embed.proj.weight"
    alone = "sender.patch_symbol.weight" in state
    expected += [] if alone else [context, "sender.lin_symbol.0.weight"]
    return [name for name in expected if name not in state]


def _plain(key: str) -> str:
    key = key.removeprefix("module.")
    for new, old in _WEIGHT_NORM.items():
        key = key.replace(new, old)
    return key


def _known(name: str) -> bool:
    return name == "logit_scale" or name.startswith(("sender.", "gumbel.", "receiver."))


def _config(state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return what of the model's config can be read off the official weights."""
    vocab, dims = state["receiver.embedding.weight"].shape
    symbol = state.get("sender.patch_symbol.patch_embed.proj.weight")
    context = symbol is not None
    embed = state["sender.patch_symbol.weight"] if symbol is None else symbol
    cells = state["sender.pe_symbol"].shape[1]
    patch = embed.shape[-1]
    side = round(cells**0.5) * patch
    layers = {name.split(".")[3] for name in state if name.startswith("receiver.encoder.layers.")}
    model = dict(
        img_size=side,
        patch_size=patch,
        hidden_dim=state["sender.pe_symbol"].shape[2],
        vocab_size=vocab,
        max_len=state["gumbel.logits.weight"].shape[0] // vocab,
        text_dims=dims,
        text_layers=len(layers),
        trainable_temperature="gumbel.temperature" in state,
    )
    if not context:
        model["symbol"] = None
    return {
        "model": model,
        "model.head": dict(
            out_dim=state["receiver.text_fc.last_layer.weight_v"].shape[0],
            bottleneck_dim=state["receiver.text_fc.last_layer.weight_v"].shape[1],
        ),
        "model.selector": dict(count=cells),
    }
