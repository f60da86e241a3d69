"""What a model is made of, part by part, and where the values of a config come from."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from patchreg.registry import MODELS
from patchreg.runner.build import load_config
from patchreg.runner.rehearsal import black_images, image_side, model_spec, side_of, without_data
from patchreg.utils.errors import UserError

_DEPTH = 3
_MANY = 4


def explain(path: str) -> str:
    """Return what a config contributes file by file, and its model part by part.

    Args:
        path: Config file.

    Raises:
        UserError: The config cannot be used.
    """
    config = load_config(path, moved={"work_dirs": "work_dirs"})
    lines = ["FILES, the later one wins"]
    for file, count, keys in contributions(path):
        lines.append(f"  {file:44s} {count:4d} values   {', '.join(keys)}")
    if "stages" in config:
        folder = Path(path).parent
        for leaf in config.stages:
            lines += [
                "",
                f"STAGE {os.path.relpath(folder / leaf)}",
                parts_table(str(folder / leaf)),
            ]
        return "\n".join(lines)
    return "\n".join([*lines, "", parts_table(path)])


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Return the values of nested dicts and lists by dotted path.

    Args:
        node: Dicts, lists and values.
        path: Where it stands.
    """
    if isinstance(node, Mapping) and node:
        items = node.items()
    elif isinstance(node, (list, tuple)) and node:
        items = enumerate(node)  # type: ignore[assignment]
    else:
        return {path: node}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= flat(value, f"{path}.{key}" if path else str(key))
    return found


def contributions(path: str) -> list[tuple[str, int, list[str]]]:
    """Return each file of a config, its values that are left in the end, and its top-level keys.

    Args:
        path: Config file; its bases come before it.
    """
    order: list[str] = []
    _collect(os.path.abspath(path), order)
    final = flat(Config.fromfile(path, import_custom_modules=False).to_dict())
    # A value belongs to the last file after which it does not change any more.
    owner: dict[str, str] = {}
    for file in order:
        values = flat(Config.fromfile(file, import_custom_modules=False).to_dict())
        for key, value in final.items():
            if key in values and _same(values[key], value) and key not in owner:
                owner[key] = file
    found = []
    for file in order:
        mine = [key for key, name in owner.items() if name == file]
        tops = list(dict.fromkeys(key.split(".")[0] for key in mine))
        found.append((os.path.relpath(file), len(mine), tops))
    return found


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and (one == other or one is other)


def _collect(file: str, order: list[str]) -> None:
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_base_":
            bases = ast.literal_eval(node.value)
            for base in [bases] if isinstance(bases, str) else bases:
                _collect(os.path.normpath(os.path.join(os.path.dirname(file), base)), order)
    if file not in order:
        order.append(file)


def difference(path: str, other: str) -> str:
    """Return the values in which two configs differ.

    Args:
        path: Config file.
        other: The one it is compared with.

    Raises:
        UserError: A config cannot be used.
    """
    ours, theirs = (
        flat(load_config(file, moved={"work_dirs": "work_dirs"}).to_dict())
        for file in (path, other)
    )
    for values in (ours, theirs):
        values.pop("work_dir", None)
    lines = [f"- {path}", f"+ {other}"]
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        if key in ours and key in theirs and _same(ours[key], theirs[key]):
            continue
        if key in ours:
            lines.append(f"- {key} = {ours[key]!r}")
        if key in theirs:
            lines.append(f"+ {key} = {theirs[key]!r}")
    if len(lines) == 2:
        lines.append("  no difference")
    return "\n".join(lines)


def parts_table(path: str) -> str:
    """Return the parts of a config's model with output shape, parameters and multiply-accumulates.

    The model is built without memory for its weights where that works, and one image goes through it as
    in evaluation.

    Args:
        path: Config file.

    Raises:
        UserError: The model cannot be built.
    """
    config = load_config(path, moved={"work_dirs": "work_dirs"})
    init_default_scope(config.get("default_scope", "patchreg"))
    spec = model_spec(config)
    given = image_side(config)
    try:
        model, side, shapes, macs, note = _run_fake(spec, given)
    except UserError:
        raise
    # A choice that depends on the data cannot be followed without data.
    except Exception:
        model, side, shapes, macs, note = _run_real(spec, given)
    rows = [
        f"MODEL at 3 x {side} x {side}{note}",
        f"  {'part':44s} {'class':34s} {'output':26s} {'parameters':>12s} {'MMACs':>9s}",
    ]
    for name, module in _shown(model):
        count = sum(value.numel() for value in module.parameters())
        share = f"{macs[name] / 1e6:9.2f}" if macs.get(name) else f"{'':9s}"
        label = "  " * name.count(".") + (name.rsplit(".", 1)[-1] or "model")
        rows.append(
            f"  {label:44s} {type(module).__name__:34s} {shapes.get(name, ''):26s} {count:12,d} {share}"
        )
    if not macs.get(""):
        rows.append(
            "  multiply-accumulates are not counted: the model does not map images to a result"
        )
    return "\n".join(row.rstrip() for row in rows)


def _shown(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts worth a line; of a list of equal blocks only the first one."""
    yield "", model
    for name, module in model.named_modules():
        depth = name.count(".") + 1
        if not name or depth > _DEPTH or not any(True for _ in module.parameters()):
            continue
        parent, _, own = name.rpartition(".")
        if (
            own.isdigit()
            and int(own) > 0
            and len(list(model.get_submodule(parent).children())) > _MANY
        ):
            continue
        yield name, module


_Run = tuple[nn.Module, int, dict[str, str], dict[str, float], str]


def _run_fake(spec: dict[str, Any], side: int) -> _Run:
    with without_data():
        model = MODELS.build(spec).eval()
        image = black_images(model, 1, side_of(model, side))
        shapes, macs = _forward(model, image)
    return model, image.shape[-1], shapes, macs, ""


def _run_real(spec: dict[str, Any], side: int) -> _Run:
    model = MODELS.build(spec).eval()
    image = black_images(model, 1, side_of(model, side))
    side = image.shape[-1]
    try:
        shapes, macs = _forward(model, image)
    except UserError:
        raise
    except Exception as error:
        return model, side, {}, {}, f" (not run: {type(error).__name__}: {str(error)[:80]})"
    note = " (one black image: the cost of models that choose depends on the image)"
    return model, side, shapes, macs, note


def _forward(model: nn.Module, image: Tensor) -> tuple[dict[str, str], dict[str, float]]:
    """Run the model once; return the first output of every part and the multiply-accumulates inside it."""
    shapes: dict[str, str] = {}
    macs: dict[str, float] = {}
    begun: dict[str, list[float]] = {}
    counter = FlopCounterMode(display=False)

    def enter(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            begun.setdefault(name, []).append(counter.get_total_flops())

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            shapes.setdefault(name, _shape(output))
            # Operations are counted as two, one multiplication and one addition.
            spent = (counter.get_total_flops() - begun[name].pop()) / 2
            macs[name] = macs.get(name, 0.0) + spent

        return hook

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave(name)))
    try:
        # Fused attention is not counted on every device; its plain form is two products.
        with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return shapes, macs


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return " x ".join(map(str, value.shape)) or "scalar"
    if isinstance(value, (list, tuple)) and value:
        return ", ".join(filter(None, map(_shape, value[:2])))
    for name in ("tokens", "features", "logits"):
        part = getattr(value, name, None)
        if isinstance(part, Tensor):
            return _shape(part)
    return ""
