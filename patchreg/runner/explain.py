"""The flow of a config as text: stage, class, file and line, arguments, hooks in call order."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope, Registry
from mmengine.runner.priority import get_priority

from patchreg import registry
from patchreg.runner.strict import NESTED, with_type

_POINTS = (
    "before_run",
    "before_train",
    "before_train_epoch",
    "before_train_iter",
    "after_train_iter",
    "after_train_epoch",
    "before_val",
    "after_val_epoch",
    "before_save_checkpoint",
    "after_train",
    "after_run",
)
_GENERIC = {
    f"{when}_{stage}_{what}": f"_{when}_{what}"
    for when in ("before", "after")
    for stage in ("train", "val", "test")
    for what in ("iter", "epoch")
}
_BUILT_IN_HOOKS = {
    "runtime_info": "RuntimeInfoHook",
    "timer": "IterTimerHook",
    "sampler_seed": "DistSamplerSeedHook",
    "logger": "LoggerHook",
    "param_scheduler": "ParamSchedulerHook",
    "checkpoint": "CheckpointHook",
}


def describe(config: Config) -> str:
    """Return the flow of a checked config as text.

    Args:
        config: What `load_config` returned.
    """
    lines = [f"config    {config.filename}", f"work dir  {config.work_dir}"]
    if config.get("load_from"):
        lines.append(f"weights   {config.load_from}")
    if "stages" in config:
        lines += ["", "STAGES"] + [
            f"  {number}  {leaf}" for number, leaf in enumerate(config.stages)
        ]
        return "\n".join(lines)
    for title, keys, kind in (
        ("TRAINING DATA", ("train_dataloader",), registry.DATASETS),
        ("MODEL", ("data_preprocessor", "model"), registry.MODELS),
        ("OPTIMISATION", ("optim_wrapper",), registry.OPTIM_WRAPPERS),
        ("SCHEDULE", ("param_scheduler",), registry.PARAM_SCHEDULERS),
        ("LOOP", ("train_cfg",), registry.LOOPS),
        ("VALIDATION", ("val_dataloader",), registry.DATASETS),
        ("METRICS", ("val_evaluator",), registry.METRICS),
        ("TEST", ("test_dataloader",), registry.DATASETS),
        ("TEST METRICS", ("test_evaluator",), registry.METRICS),
    ):
        rows: list[str] = []
        for key in keys:
            if config.get(key) is not None:
                rows += _rows(key, with_type(key, config[key]), kind, 1)
        if not rows:
            continue
        if title.startswith("TEST") and config.get(keys[0]) == config.get(
            keys[0].replace("test", "val")
        ):
            rows = [f"  as {'VALIDATION' if title == 'TEST' else 'METRICS'}"]
        lines += ["", title, *rows]
    lines += ["", "HOOKS, in call order (priority)"]
    hooks = _hooks(config)
    for priority, name, built in hooks:
        lines.append(f"  {priority:3d}  {name:<24s}{where(built)}")
    lines.append("")
    for point in _POINTS:
        called = [name for _, name, built in hooks if implements(built, point)]
        if called:
            lines.append(f"  {point:<24s}{' > '.join(called)}")
    return "\n".join(lines)


def where(built: Any) -> str:
    """Return file and line of a class or function, relative to the project or its package.

    Args:
        built: Class or function.
    """
    try:
        path, line = inspect.getsourcefile(built), inspect.getsourcelines(built)[1]
    except (TypeError, OSError):
        return "built in"
    if path is None:
        return "built in"
    full = Path(path).resolve()
    if full.is_relative_to(Path.cwd()) and "site-packages" not in full.parts:
        return f"{os.path.relpath(full)}:{line}"
    parts = full.parts
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :]) + f":{line}"
    package = built.__module__.split(".", 1)[0]
    start = len(parts) - 1 - parts[::-1].index(package) if package in parts else -2
    return "/".join(parts[start:]) + f":{line}"


def _get(kind: Registry, name: Any) -> Any:
    if not isinstance(name, str):
        return name
    with DefaultScope.overwrite_default_scope(registry.SCOPE):
        return kind.get(name)


def _rows(label: str, node: Any, kind: Registry, depth: int) -> Iterator[str]:
    indent = "  " * depth
    if isinstance(node, (list, tuple)):
        for number, item in enumerate(node):
            yield from _rows(f"{label}.{number}", item, kind, depth)
        return
    if not isinstance(node, Mapping):
        return
    plain: list[tuple[str, Any]] = []
    nested: list[tuple[str, Any]] = []
    for key, value in node.items():
        if key == "type":
            continue
        # The type of a clip_grad is a kind of norm, not a class.
        built_from = key != "clip_grad" and _holds_parts(value)
        (nested if built_from else plain).append((key, value))
    arguments = ", ".join(f"{key}={_short(value)}" for key, value in plain)
    name = node.get("type")
    if name is None:
        yield f"{indent}{label:<{max(1, 20 - len(indent))}s} {arguments}".rstrip()
    else:
        built = _get(kind, name)
        shown = name if isinstance(name, str) else name.__name__
        yield f"{indent}{label:<{max(1, 20 - len(indent))}s} {shown:<34s} {where(built)}"
        if arguments:
            yield f"{indent}{'':<{max(1, 20 - len(indent))}s}   {arguments}"
    for key, value in nested:
        yield from _rows(key, value, NESTED.get(key, kind), depth + 1)


def _holds_parts(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "type" in value
    return isinstance(value, (list, tuple)) and any(
        isinstance(item, Mapping) and "type" in item for item in value
    )


def _short(value: Any) -> str:
    text = repr(dict(value)) if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 90 else text[:87] + "..."


def _hooks(config: Config) -> list[tuple[int, str, Any]]:
    nodes: dict[str, Any] = {key: dict(type=name) for key, name in _BUILT_IN_HOOKS.items()}
    for key, node in (config.get("default_hooks") or {}).items():
        if node is None:
            nodes.pop(key, None)
        else:
            nodes[key] = node
    found = []
    for node in [*nodes.values(), *(config.get("custom_hooks") or [])]:
        built = _get(registry.HOOKS, node["type"])
        priority = node.get("priority", getattr(built, "priority", "NORMAL"))
        found.append((int(get_priority(priority)), built.__name__, built))
    return sorted(found, key=lambda item: item[0])


def implements(hook: type, point: str) -> bool:
    """Whether a hook class does something at a hook point.

    `before_train_iter` and its like fall back to `_before_iter` and its like in MMEngine's base class.

    Args:
        hook: Hook class.
        point: Name of the hook point.
    """
    names = [point, _GENERIC.get(point, point)]
    return any(getattr(hook, name, None) is not getattr(Hook, name, None) for name in names)
