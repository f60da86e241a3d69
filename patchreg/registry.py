"""All registries, in the order in which data flows through a run.

Registry name == class name; a part that belongs to one method lives in `patchreg/methods/<method>/`, everything
else in the folder of its stage. Nobody keeps a list of methods: the first look-up imports the shared
stages, every package below `patchreg/methods`, and every entry point of the group `patchreg.methods`. A
method that fails to import does not stop the others; its traceback is shown when one of its classes
is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import traceback
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from mmengine import registry as root
from mmengine.registry import Registry

from patchreg.utils.errors import ConfigError, did_you_mean

SCOPE = "patchreg"
STAGES = ("datasets", "transforms", "models", "losses", "hooks", "metrics", "runner")
FAILED: dict[str, str] = {}
"""Import path of each plug-in that could not be imported, with its traceback."""

_state = {"done": False}


def discover() -> None:
    """Import the shared stages and every plug-in once; remember the plug-ins that fail."""
    if _state["done"]:
        return
    _state["done"] = True
    for stage in STAGES:
        importlib.import_module(f"{SCOPE}.{stage}")
    methods = importlib.import_module(f"{SCOPE}.methods")
    for module in pkgutil.iter_modules(methods.__path__):
        _import_plugin(f"{methods.__name__}.{module.name}")
    for entry in entry_points(group="patchreg.methods"):
        _import_plugin(entry.value.split(":", 1)[0])


def method_modules(part: str) -> dict[str, ModuleType]:
    """Return the module of a given name of every method that has one, by method.

    Args:
        part: Name of the module, such as "convert".
    """
    discover()
    package = importlib.import_module(f"{SCOPE}.methods")
    names = {
        item.name: f"{package.__name__}.{item.name}"
        for item in pkgutil.iter_modules(package.__path__)
    }
    names |= {
        item.name: item.value.split(":")[0] for item in entry_points(group="patchreg.methods")
    }
    found: dict[str, ModuleType] = {}
    for method, name in names.items():
        loaded = sys.modules.get(name)
        if loaded is None or not hasattr(loaded, "__path__"):
            continue
        if importlib.util.find_spec(f"{name}.{part}") is not None:
            found[method] = importlib.import_module(f"{name}.{part}")
    return found


def _import_plugin(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception:
        FAILED[name] = traceback.format_exc()
        for loaded in [item for item in sys.modules if item == name or item.startswith(name + ".")]:
            del sys.modules[loaded]


class StageRegistry(Registry):
    """Child of an MMEngine root registry that finds plug-ins by itself and names the nearest key."""

    def import_from_location(self) -> None:
        """Import everything that registers, once."""
        discover()

    def names(self) -> list[str]:
        """Return every key that can be built without a scope prefix, own ones first."""
        discover()
        found = list(self._module_dict)
        parent = self.parent
        while parent is not None:
            found += [key for key in parent.module_dict if key not in found]
            parent = parent.parent
        return found

    def get(self, key: str) -> Any:
        """Return the class registered under a key.

        Args:
            key: Class name, or `scope.Name` for another package such as `mmpretrain.RandAugment`.

        Raises:
            ConfigError: Nothing is registered under the key; names the nearest keys and shows why a plug-in
                that mentions the key could not be imported.
        """
        found = self._find(key)
        if found is None:
            raise ConfigError(self.missing(key))
        return found

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def _find(self, key: str) -> Any:
        # MMEngine takes a key with dots for an import path when nothing is registered under it.
        name = key.rsplit(".", 1)[-1]
        if not name or key.startswith("."):
            return None
        try:
            found = super().get(key)
        except (RuntimeError, ImportError, TypeError, ValueError):
            return None
        # What an import path leads to counts only if it is a class; functions have to be registered.
        if found is None or isinstance(found, type) or name in self._known(key):
            return found
        return None

    def _known(self, key: str) -> Any:
        scope, _ = self.split_scope_key(key)
        other = self._get_root_registry()._search_child(scope) if scope else None
        return other.module_dict if other is not None else self.names()

    def missing(self, key: str) -> str:
        """Say that a key is unknown, which ones are near, and which plug-ins failed to import.

        Args:
            key: The key that was asked for.
        """
        scope, name = self.split_scope_key(key)
        if scope is not None and scope != self.scope:
            other = self._get_root_registry()._search_child(scope)
            if other is None or not name:
                return (
                    f"'{key}': the package '{scope}' is not installed or has no registry; install it "
                    f"(pip install {scope}) or use a {self.name} of patchreg"
                )
            return f"'{key}' is not in the {self.name} registry of '{scope}'." + did_you_mean(
                name, other.module_dict
            )
        hint = did_you_mean(name, self.names())
        text = f"'{name}' is not in the {self.name} registry." + hint
        if not hint:
            text += (
                " A class of your own is found when it lies in patchreg/methods/<method>/, in an installed "
                "package with an entry point of the group 'patchreg.methods', or in custom_imports"
            )
        for plugin, trace in FAILED.items():
            text += f"\nThe plug-in '{plugin}' could not be imported, so its classes are unknown:\n{trace}"
        return text.rstrip()


def _child(parent: Registry) -> StageRegistry:
    return StageRegistry(parent.name, parent=parent, scope=SCOPE)


# which images, and how they are read and changed
DATASETS = _child(root.DATASETS)
DATA_SAMPLERS = _child(root.DATA_SAMPLERS)
TRANSFORMS = _child(root.TRANSFORMS)

# what is computed; one registry, named by the role of its classes
MODELS = _child(root.MODELS)
BACKBONES = NECKS = HEADS = SELECTORS = LOSSES = MODELS
MODEL_WRAPPERS = _child(root.MODEL_WRAPPERS)
WEIGHT_INITIALIZERS = _child(root.WEIGHT_INITIALIZERS)
TASK_UTILS = _child(root.TASK_UTILS)
FUNCTIONS = _child(root.FUNCTIONS)

# how it is optimised
OPTIMIZERS = _child(root.OPTIMIZERS)
OPTIM_WRAPPERS = _child(root.OPTIM_WRAPPERS)
OPTIM_WRAPPER_CONSTRUCTORS = _child(root.OPTIM_WRAPPER_CONSTRUCTORS)
PARAM_SCHEDULERS = _child(root.PARAM_SCHEDULERS)

# what happens around it
RUNNERS = _child(root.RUNNERS)
RUNNER_CONSTRUCTORS = _child(root.RUNNER_CONSTRUCTORS)
STRATEGIES = _child(root.STRATEGIES)
LOOPS = _child(root.LOOPS)
HOOKS = _child(root.HOOKS)

# what is measured and shown
METRICS = _child(root.METRICS)
EVALUATOR = _child(root.EVALUATOR)
INFERENCERS = _child(root.INFERENCERS)
LOG_PROCESSORS = _child(root.LOG_PROCESSORS)
VISUALIZERS = _child(root.VISUALIZERS)
VISBACKENDS = _child(root.VISBACKENDS)
