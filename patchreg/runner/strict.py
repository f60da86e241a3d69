"""The check of a config before anything runs: keys, arguments, classes, types, lost overrides."""

from __future__ import annotations

import ast
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import torch
from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from patchreg import registry
from patchreg.utils.errors import ConfigError, MissingFileError, did_you_mean
from patchreg.utils.weights import how_to_get

ROOTS: dict[str, Registry] = {
    "model": registry.MODELS,
    "data_preprocessor": registry.MODELS,
    "train_dataloader": registry.DATASETS,
    "val_dataloader": registry.DATASETS,
    "test_dataloader": registry.DATASETS,
    "train_cfg": registry.LOOPS,
    "val_cfg": registry.LOOPS,
    "test_cfg": registry.LOOPS,
    "optim_wrapper": registry.OPTIM_WRAPPERS,
    "param_scheduler": registry.PARAM_SCHEDULERS,
    "val_evaluator": registry.METRICS,
    "test_evaluator": registry.METRICS,
    "default_hooks": registry.HOOKS,
    "custom_hooks": registry.HOOKS,
    "visualizer": registry.VISUALIZERS,
    "log_processor": registry.LOG_PROCESSORS,
    "model_wrapper_cfg": registry.MODEL_WRAPPERS,
}
"""Top-level keys whose dicts are built, with the registry they are built from."""

NESTED: dict[str, Registry] = {
    "dataset": registry.DATASETS,
    "datasets": registry.DATASETS,
    "pipeline": registry.TRANSFORMS,
    "transforms": registry.TRANSFORMS,
    "batch_augment": registry.TRANSFORMS,
    "sampler": registry.DATA_SAMPLERS,
    "batch_sampler": registry.DATA_SAMPLERS,
    "collate_fn": registry.FUNCTIONS,
    "worker_init_fn": registry.FUNCTIONS,
    "data_preprocessor": registry.MODELS,
    "init_cfg": registry.WEIGHT_INITIALIZERS,
    "optimizer": registry.OPTIMIZERS,
    "vis_backends": registry.VISBACKENDS,
    "metrics": registry.METRICS,
    "rankers": registry.MODELS,
}
"""Keys at any depth below which another registry holds."""

INJECTED: dict[str, set[str]] = {
    "data sampler": {"dataset", "seed", "sampler", "batch_size"},
    "loop": {"runner", "dataloader", "evaluator"},
    "optimizer": {"params"},
    "parameter scheduler": {"optimizer", "param_name"},
    "optim_wrapper": {"optimizer"},
    "visualizer": {"name", "save_dir", "vis_backends"},
    "vis_backend": {"save_dir"},
    "function": {"data_batch", "worker_id", "num_workers", "rank", "seed"},
    "model_wrapper": {"module"},
}
"""Arguments that the engine passes itself, by registry."""

EXTRA: dict[str, set[str]] = {
    "hook": {"priority"},
    "optim_wrapper": {"optimizer", "constructor", "paramwise_cfg", "accumulative_counts"},
    "parameter scheduler": {"convert_to_iter_based", "epoch_length"},
    "loop": {"by_epoch"},
}
"""Keys that are read from the dict before the class is called, by registry."""

PLAIN: dict[str, set[str]] = {
    "auto_scale_lr": {"enable", "base_batch_size"},
    "randomness": {"seed", "diff_rank_seed", "deterministic"},
    "env_cfg": {"cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"},
    "custom_imports": {"imports", "allow_failed_imports"},
    "compare": {"label", "checkpoint", "knob", "values", "order"},
}
"""Top-level dicts that are not built, with their keys."""

LOADER_KEYS = (set(inspect.signature(DataLoader.__init__).parameters) - {"self"}) | {
    "num_batch_per_epoch",
    "disable_subprocess_warning",
    "bad_samples",
}
PARAMWISE_KEYS = {
    "lr_mult",
    "decay_mult",
    "norm_decay_mult",
    "bias_lr_mult",
    "bias_decay_mult",
    "dwconv_decay_mult",
    "dcn_offset_lr_mult",
    "flat_decay_mult",
    "bypass_duplicate",
    "custom_keys",
}
TOP_LEVEL = (
    (set(inspect.signature(Runner.__init__).parameters) - {"self", "cfg"})
    | set(ROOTS)
    | set(PLAIN)
    | {
        "stages",
        "find_unused_parameters",
        "activation_checkpointing",
        "efficient_conv_bn_eval",
        "compile",
        "sync_bn",
    }
)
DEFAULT_HOOKS = {"runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint"}


def check_config(config: Config, to_come: Sequence[str] = ()) -> None:
    """Check every key, class, argument, type and needed file of a config.

    Args:
        config: A loaded config.
        to_come: Folders whose checkpoints an earlier stage will write.

    Raises:
        ConfigError: Names the path in the config, what is wrong and the nearest right name.
        MissingFileError: A checkpoint that the config needs does not exist.
    """
    imports = config.get("custom_imports")
    if imports:
        _check_plain("custom_imports", imports)
        from mmengine.utils import import_modules_from_strings

        try:
            import_modules_from_strings(**imports)
        except ImportError as error:
            raise ConfigError(
                f"custom_imports: {error}; check the module's name and that its folder is on PYTHONPATH"
            ) from error
    for key in config:
        if key not in TOP_LEVEL and not key.startswith("_"):
            hint = did_you_mean(key, TOP_LEVEL) or (
                " A helper variable starts with an underscore; known keys: "
                + ", ".join(sorted(TOP_LEVEL))
            )
            raise ConfigError(f"unknown top-level key '{key}'.{hint}")
    if "stages" not in config and "model" not in config:
        raise ConfigError("the config has no 'model'; a config that is only a base cannot be run")
    stages = config.get("stages", [])
    if not isinstance(stages, (list, tuple)) or not all(isinstance(leaf, str) for leaf in stages):
        raise ConfigError(
            f"stages is {_short(stages)}; expected a list of config files, such as ['first.py']"
        )
    _check_hooks(config)
    for key in config:
        value = config[key]
        if value is None or key.startswith("_"):
            continue
        if key in PLAIN:
            _check_plain(key, value)
        elif key in ("train_dataloader", "val_dataloader", "test_dataloader"):
            _check_loader(key, value)
        elif key in ROOTS:
            _check_node(key, with_type(key, value), ROOTS[key])
    _check_groups(config)
    _check_files(config, to_come)


def with_type(key: str, value: Any) -> Any:
    """Add the class that the engine takes for a dict that names none.

    Args:
        key: Top-level key.
        value: Its value.
    """
    usual = {
        "val_cfg": "ValLoop",
        "test_cfg": "TestLoop",
        "optim_wrapper": "OptimWrapper",
        "log_processor": "LogProcessor",
        "visualizer": "Visualizer",
    }
    if key == "train_cfg" and isinstance(value, Mapping):
        usual[key] = "EpochLoop" if value.get("by_epoch", True) else "IterLoop"
    if isinstance(value, Mapping) and "type" not in value and key in usual:
        return {"type": usual[key], **value}
    return value


def _check_groups(config: Config) -> None:
    groups = (
        ("train_cfg", "train_dataloader", "optim_wrapper"),
        ("val_cfg", "val_dataloader", "val_evaluator"),
        ("test_cfg", "test_dataloader", "test_evaluator"),
    )
    for group in groups:
        given = [key for key in group if config.get(key) is not None]
        if given and len(given) < len(group):
            absent = ", ".join(key for key in group if key not in given)
            raise ConfigError(
                f"{', '.join(given)} is set but {absent} is not; they belong together: set all or none of them"
            )
    hooks = config.get("default_hooks") or {}
    for name in hooks:
        hint = did_you_mean(name, DEFAULT_HOOKS - set(hooks))
        if name not in DEFAULT_HOOKS and hint:
            raise ConfigError(
                f"default_hooks.{name}: not one of the default hooks.{hint} Hooks of your own belong into "
                "custom_hooks"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 90 else text[:87] + "..."


def _check_hooks(config: Config) -> None:
    """Every hook is a dict with a type; None takes a default hook out."""
    default, custom = config.get("default_hooks") or {}, config.get("custom_hooks") or []
    if not isinstance(default, Mapping):
        raise ConfigError(f"default_hooks is {_short(default)}; expected a dict of hooks by name")
    if not isinstance(custom, (list, tuple)):
        raise ConfigError(f"custom_hooks is {_short(custom)}; expected a list of hooks")
    named = [(f"default_hooks.{key}", node) for key, node in default.items() if node is not None]
    named += [(f"custom_hooks.{index}", node) for index, node in enumerate(custom)]
    for path, node in named:
        if not isinstance(node, Mapping) or not isinstance(node.get("type"), str):
            raise ConfigError(
                f"{path} is {_short(node)}; expected a dict with 'type', the name of a hook"
            )


def _check_files(config: Config, to_come: Sequence[str]) -> None:
    wanted = [("load_from", config.get("load_from"))]
    for path, node in _walk("", config._cfg_dict):
        if isinstance(node, Mapping) and node.get("type") == "Pretrained":
            wanted.append((f"{path}.checkpoint", node.get("checkpoint")))
    for path, name in wanted:
        if not isinstance(name, str) or any(Path(name).is_relative_to(item) for item in to_come):
            continue
        if not Path(name).is_file():
            raise MissingFileError(f"{path}: '{name}' does not exist; {how_to_get(name)}")


def _walk(path: str, node: Any) -> Iterator[tuple[str, Any]]:
    yield path, node
    if isinstance(node, Mapping):
        for key in node:
            if not str(key).startswith("_"):
                yield from _walk(f"{path}.{key}" if path else str(key), node[key])
    elif isinstance(node, (list, tuple)):
        for number, item in enumerate(node):
            yield from _walk(f"{path}.{number}", item)


def _check_plain(key: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{key} is {value!r}; expected a dict with {', '.join(sorted(PLAIN[key]))}"
        )
    for name in value:
        if name not in PLAIN[key]:
            raise ConfigError(
                f"{key}.{name}: unknown key.{did_you_mean(name, PLAIN[key])} Known: "
                + ", ".join(sorted(PLAIN[key]))
            )


def _check_loader(path: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{path} is {value!r}; expected a dict with dataset, sampler, batch_size, ..."
        )
    for key in value:
        if key not in LOADER_KEYS:
            raise ConfigError(
                f"{path}.{key}: a dataloader has no argument '{key}'.{did_you_mean(key, LOADER_KEYS)}"
            )
    for key in ("dataset", "sampler"):
        if key not in value and "batch_sampler" not in value:
            raise ConfigError(f"{path}.{key} is missing")
    hints = {
        "batch_size": int,
        "num_workers": int,
        "pin_memory": bool,
        "drop_last": bool,
        "persistent_workers": bool,
    }
    for key, hint in hints.items():
        if key in value and not _fits(value[key], hint):
            raise ConfigError(_wrong_type(f"{path}.{key}", value[key], hint))
    for key in value:
        if key in NESTED:
            _check_node(f"{path}.{key}", value[key], NESTED[key])


def _check_node(path: str, node: Any, kind: Registry) -> None:
    if isinstance(node, (list, tuple)):
        for number, item in enumerate(node):
            _check_node(f"{path}.{number}", item, kind)
        return
    if not isinstance(node, Mapping):
        return
    name = node.get("type")
    if name is not None:
        built = _lookup(path, name, kind)
        _check_arguments(path, node, built, kind)
        if isinstance(name, str) and "." in name:
            # Below a class of another package its own conventions hold.
            return
    for key in node:
        if key.endswith("_dataloader") and node[key] is not None:
            _check_loader(f"{path}.{key}", node[key])
        elif key == "paramwise_cfg" and isinstance(node[key], Mapping):
            _check_paramwise(f"{path}.{key}", node[key])
        elif key == "constructor":
            _lookup(f"{path}.{key}", node[key], registry.OPTIM_WRAPPER_CONSTRUCTORS)
        # The type of a clip_grad is a kind of norm, not a class.
        elif key not in ("type", "clip_grad"):
            _check_node(f"{path}.{key}", node[key], NESTED.get(key, kind))


def _check_paramwise(path: str, value: Mapping) -> None:
    for key in value:
        if key not in PARAMWISE_KEYS:
            raise ConfigError(f"{path}.{key}: unknown key.{did_you_mean(key, PARAMWISE_KEYS)}")


def _lookup(path: str, name: Any, kind: Registry) -> Callable:
    if not isinstance(name, str):
        if callable(name):
            return name
        raise ConfigError(f"{path}.type is {name!r}; expected a class name as text")
    from mmengine.registry import DefaultScope

    try:
        with DefaultScope.overwrite_default_scope(registry.SCOPE):
            return kind.get(name)
    except ConfigError as error:
        raise ConfigError(f"{path}.type: {error}") from error


@functools.cache
def accepted(built: Callable) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the named parameters of a class or function, and whether it takes any others.

    `**kwargs` is followed up the inheritance.

    Args:
        built: Class or function.
    """
    if not inspect.isclass(built):
        parameters = dict(inspect.signature(built).parameters)
        is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return {k: p for k, p in parameters.items() if p.kind is not p.VAR_KEYWORD}, is_open
    found: dict[str, inspect.Parameter] = {}
    for base in built.__mro__:
        maker = _maker(base)
        if maker is None or base in (object, torch.nn.Module):
            continue
        try:
            parameters = dict(list(inspect.signature(maker).parameters.items())[1:])
        except (ValueError, TypeError):
            return found, True
        passes_on = False
        for name, parameter in parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                passes_on = True
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                found.setdefault(name, parameter)
        if not passes_on:
            return found, False
    return found, False


def _maker(built: type) -> Callable | None:
    """Return what a class itself is made by; a wrapper that gives back what it wraps has `__new__` only."""
    found = built.__dict__.get("__init__", built.__dict__.get("__new__"))
    return getattr(found, "__func__", found)


@functools.cache
def _hints(built: Callable) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    functions = [built]
    if inspect.isclass(built):
        functions = [maker for base in built.__mro__ if (maker := _maker(base)) is not None]
    for function in functions:
        try:
            own = typing.get_type_hints(function)
        except Exception:
            continue
        for name, hint in own.items():
            hints.setdefault(name, hint)
    return hints


def _check_arguments(path: str, node: Mapping, built: Callable, kind: Registry) -> None:
    parameters, is_open = accepted(built)
    extra = EXTRA.get(kind.name, set())
    injected = INJECTED.get(kind.name, set())
    name = getattr(built, "__name__", str(built))
    for key in node:
        if key in ("type", "_scope_", "_delete_") or key in extra:
            continue
        if key not in parameters and not is_open:
            known = set(parameters) | extra
            raise ConfigError(
                f"{path}.{key}: {name} has no argument '{key}'.{did_you_mean(key, known)} It takes: "
                + (", ".join(item for item in parameters if item not in injected) or "nothing")
            )
    hints = _hints(built)
    for key, value in node.items():
        if key not in parameters or key not in hints:
            continue
        hint = hints[key]
        if value is None and parameters[key].default is None:
            continue
        if not _fits(value, hint):
            raise ConfigError(f"{_wrong_type(f'{path}.{key}', value, hint)} (argument of {name})")
    for key, parameter in parameters.items():
        needed = (
            parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        )
        if needed and key not in node and key not in injected and key not in extra:
            raise ConfigError(f"{path}: {name} needs the argument '{key}', which is missing")


def _wrong_type(path: str, value: Any, hint: Any) -> str:
    return f"{path} is {value!r} of type {type(value).__name__}; expected {_hint_text(hint)}"


def _hint_text(hint: Any) -> str:
    """Return a type as annotations write it; Python 3.10 gives Optional[int] for int | None."""
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " | ".join(_hint_text(part) for part in typing.get_args(hint))
    if inspect.isclass(hint) and not typing.get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a config value can be meant by an annotation; in doubt it can."""
    if hint is Any or isinstance(hint, (str, typing.TypeVar)):
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, item) for item in arguments)
    if origin is Literal:
        return value in arguments
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    base = origin or hint
    if base in (list, tuple, set, Sequence) or (
        inspect.isclass(base) and issubclass(base, (list, tuple))
    ):
        if isinstance(value, str) or not isinstance(value, (list, tuple, set)):
            return False
        if base is tuple and arguments and arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(_fits, value, arguments))
        return not arguments or all(_fits(item, arguments[0]) for item in value)
    if inspect.isclass(base) and issubclass(base, Mapping):
        return isinstance(value, Mapping)
    if inspect.isclass(base) and not isinstance(value, (Mapping, str, list, tuple)):
        # A plain number where an object is expected is never right; an object may be built from others.
        return isinstance(value, base) or not isinstance(value, (bool, int, float))
    return True


def check_options(config: Config, options: Mapping[str, Any]) -> None:
    """Refuse overrides of helper variables, which nothing reads any more once the file is loaded.

    Args:
        config: The loaded config.
        options: Overrides by dotted key.

    Raises:
        ConfigError: Names the keys to override instead.
    """
    for key in options:
        helper = key.split(".", 1)[0]
        if not helper.startswith("_"):
            continue
        if helper not in config:
            known = [name for name in config if not name.startswith("_")]
            raise ConfigError(f"--cfg-options {key}: unknown key.{did_you_mean(helper, known)}")
        places = [
            path
            for path, node in _walk("", config._cfg_dict)
            if path and isinstance(node, (Mapping, list, tuple)) and node == config[helper]
        ]
        rest = key[len(helper) :]
        instead = ", ".join(f"{place}{rest}" for place in places) or "the keys that use its value"
        raise ConfigError(
            f"--cfg-options {key}: '{helper}' is a helper variable whose value was already copied; override "
            f"{instead} instead"
        )


def check_shadowed_helpers(path: str) -> None:
    """Refuse a config file that sets a helper variable of its base again without using it itself.

    Args:
        path: Config file.

    Raises:
        ConfigError: The new value would be lost, because the base has already copied the old one.
    """
    tree = ast.parse(Path(path).read_text(encoding="utf-8"), filename=path)
    own = _assigned(tree)
    used = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    inherited: set[str] = set()
    for base in _bases(path, tree):
        check_shadowed_helpers(str(base))
        inherited |= _helpers_of(base)
    for name in sorted(own & inherited - used):
        raise ConfigError(
            f"{path}: sets the helper variable '{name}' of its base again but does not use it, so the new "
            "value has no effect; override the keys that should change, or use it in this file"
        )


def _assigned(tree: ast.Module) -> set[str]:
    return {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.startswith("_") and target.id != "_base_"
    }


def _bases(path: str, tree: ast.Module) -> list[Path]:
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == "_base_"
        ):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                return []
            names = [value] if isinstance(value, str) else list(value)
            found = [(Path(path).parent / name) for name in names]
            return [item for item in found if item.is_file()]
    return []


def _helpers_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    names = _assigned(tree)
    for base in _bases(str(path), tree):
        names |= _helpers_of(base)
    return names
