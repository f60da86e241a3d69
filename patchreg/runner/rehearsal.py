"""A model's parts put together before the run: one image, or one batch of views, without data and memory."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from patchreg.models.preprocessor import ImagePreprocessor
from patchreg.registry import MODELS, TRANSFORMS
from patchreg.runner.build import config_errors
from patchreg.runner.checkpoint import check_state, parts_to_load
from patchreg.utils.errors import ConfigError, UserError

_BATCH = 2
_MISMATCH = re.compile(r"shapes? .*(cannot|mismatch|invalid)|must match|size mismatch|channels")
_BROKEN = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)


def model_spec(config: Config) -> dict[str, Any]:
    """Return the dict that a config's model is built from, its preprocessor included.

    Args:
        config: A loaded config.
    """
    spec = config.model.to_dict()
    if config.get("data_preprocessor") is not None:
        spec.setdefault("data_preprocessor", config.data_preprocessor.to_dict())
    return spec


def image_side(config: Config) -> int:
    """Return the side of the images in px that a config's model takes, as far as the config tells.

    Args:
        config: A loaded config.
    """
    backbone = config.model.get("backbone") or {}
    if isinstance(backbone, Mapping) and isinstance(backbone.get("img_size"), int):
        return backbone["img_size"]
    for key in ("test_dataloader", "val_dataloader", "train_dataloader"):
        dataset = (config.get(key) or {}).get("dataset") or {}
        for step in reversed(dataset.get("pipeline") or []):
            if not isinstance(step, Mapping):
                continue
            for name in ("crop_size", "size", "scale"):
                value = step.get(name)
                value = value[0] if isinstance(value, (list, tuple)) and value else value
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        if dataset.get("type") in ("CIFAR10Dataset", "CIFAR100Dataset", "QuickStartDataset"):
            return 32
    return 224


def side_of(model: nn.Module, side: int) -> int:
    """Return the side of images that a model insists on, such as one that timm has built, else `side`.

    Args:
        model: The model.
        side: What the config tells, in px.
    """
    for module in model.modules():
        size = getattr(module, "img_size", None)
        if isinstance(size, (tuple, list)) and size and isinstance(size[0], int):
            return size[0]
    return max(side, getattr(model, "min_image_size", 0))


def black_images(model: nn.Module, count: int, side: int) -> Tensor:
    """Return black images as a model gets them: its preprocessor's view of them, where it takes one.

    Args:
        model: The model.
        count: Images.
        side: Their side in px, before the view.

    Shape:
        Returns [count, 3, H, W].
    """
    images = torch.zeros(count, 3, side, side)
    view = getattr(getattr(model, "data_preprocessor", None), "view", None)
    return images if view is None else view(images)


@contextmanager
def without_data() -> Iterator[None]:
    """Make new tensors without memory and values, on the meta device, and leave weights as they come.

    torch's fake tensors would follow more models, but building PatchGame with them corrupts memory.
    """
    # The only initialiser that looks at its values, and a question that knows no such device.
    initialiser, question = nn.init.trunc_normal_, torch.is_autocast_enabled
    nn.init.trunc_normal_ = lambda tensor, *_, **__: tensor
    torch.is_autocast_enabled = lambda *_: False
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
            yield
    finally:
        nn.init.trunc_normal_, torch.is_autocast_enabled = initialiser, question


def rehearse(config: Config) -> None:
    """Build a config's model, look at the weights it names, and send one batch through it.

    Models that take other things than images are built only. A choice that depends on the data is followed
    in evaluation with a black image; a training step is followed up to it.

    Args:
        config: A checked config.

    Raises:
        ConfigError: The model cannot be built, or a part cannot take what the one before it gives.
        CheckpointError: Weights that a part names belong to another model.
    """
    with config_errors("default_scope"):
        init_default_scope(config.get("default_scope", "patchreg"))
    spec = model_spec(config)
    with config_errors("the model cannot be built"):
        try:
            with without_data():
                model = MODELS.build(spec)
        except UserError:
            raise
        except Exception:
            model = MODELS.build(spec)
    for part, path, state in parts_to_load(model, missing_ok=True):
        check_state(part, state, path, strict=False)
    if not isinstance(getattr(model, "data_preprocessor", None), ImagePreprocessor):
        return
    side = side_of(model, image_side(config))

    def evaluate(model: nn.Module) -> None:
        model.eval()
        model(black_images(model, 1, side))

    _try(evaluate, model, spec, must_end=True)
    if config.get("train_cfg") is None:
        return
    with config_errors("no training batch can be made"):
        views = views_of(config, model)

    def train(model: nn.Module) -> None:
        model.train()
        if views is not None:
            black = tree_map_only(Tensor, lambda v: torch.zeros(v.shape, dtype=v.dtype), views)
            model(**black, mode="loss")
            return
        labels = [BaseDataElement(gt_label=torch.zeros(1, dtype=torch.long)) for _ in range(_BATCH)]
        model(black_images(model, _BATCH, side), labels, mode="loss")

    _try(train, model, spec, must_end=False)


def views_of(config: Config, model: nn.Module) -> dict[str, Any] | None:
    """Return views of black images, as a model of several views is trained with, or None for other models.

    Args:
        config: A checked config.
        model: Its model, for the preprocessor.
    """
    pipeline = ((config.get("train_dataloader") or {}).get("dataset") or {}).get("pipeline") or []
    for step in pipeline:
        if step.get("type") == "MultiView":
            with config_errors("train_dataloader.dataset.pipeline"):
                cut: Any = TRANSFORMS.build(step.to_dict())
            black = np.zeros((256, 256, 3), dtype=np.uint8)
            samples = [cut(dict(img=black)) for _ in range(_BATCH)]
            preprocessor: Any = type(model.data_preprocessor)()
            return preprocessor(default_collate(samples), True)
    return None


def _try(
    run: Callable[[nn.Module], None], model: nn.Module, spec: dict[str, Any], must_end: bool
) -> None:
    """Run without data; what fails there may be the want of data, so it has to fail with data too."""
    place = f"the model cannot {'evaluate' if must_end else 'train on'} an image"
    with torch.no_grad(), config_errors(place):
        try:
            with without_data():
                return run(model)
        except Exception as error:
            if not must_end and not _MISMATCH.search(str(error)):
                return None
        real = MODELS.build(spec)
        with _entered(real) as stack:
            try:
                return run(real)
            except UserError:
                raise
            except _BROKEN as error:
                raise ConfigError(_explain(real, spec, stack, error)) from error


@contextmanager
def _entered(model: nn.Module) -> Iterator[list[tuple[str, nn.Module, Any]]]:
    """Yield the parts that are being run, outermost first, with what was given to them."""
    stack: list[tuple[str, nn.Module, Any]] = []

    def enter(name: str) -> Any:
        return lambda module, inputs: stack.append((name, module, inputs))

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        stack.pop()

    handles = []
    for name, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(enter(name)),
            module.register_forward_hook(leave),
        ]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _explain(
    model: nn.Module, spec: dict[str, Any], stack: list[tuple[str, nn.Module, Any]], error: Any
) -> str:
    """Say in which part of the config a model broke, and which argument would fit."""
    if not stack:
        return f"model: {type(model).__name__} cannot be run: {error}"
    name, module, inputs = stack[-1]
    path, nodes = _place(spec, name)
    part = f"'{name}' ({type(module).__name__})"
    given = next((value for value in inputs if isinstance(value, Tensor)), None)
    wanted, found = _channels(module, given)
    if given is None or wanted is None or wanted == found:
        reason = str(error).splitlines()[0]
        shape = f" with {' x '.join(map(str, given.shape))}" if given is not None else ""
        return f"{path}: {part} cannot be run{shape}: {reason}"
    text = (
        f"{path}: {part} takes {wanted} channels, but what comes to it has {found} "
        f"({' x '.join(map(str, given.shape))})"
    )
    for node in reversed(nodes):
        keys = [key for key, value in node.items() if type(value) is int and value == wanted]
        if keys:
            return f"{text}. Did you mean {' or '.join(f'{key}={found}' for key in keys)}?"
    return text


def _channels(module: nn.Module, given: Tensor | None) -> tuple[int | None, int | None]:
    """Return the channels that a layer takes and those that it was given, where the layer tells."""
    if given is None or given.ndim < 2:
        return None, None
    if isinstance(module, nn.Linear):
        return module.in_features, given.shape[-1]
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1], given.shape[-1]
    if isinstance(module, nn.Conv2d):
        return module.in_channels, given.shape[1]
    if isinstance(module, nn.BatchNorm2d):
        return module.num_features, given.shape[1]
    return None, None


def _place(spec: dict[str, Any], name: str) -> tuple[str, list[Mapping[str, Any]]]:
    """Return where the config of a part stands, and the dicts on the way to it."""
    path = "model"
    nodes: list[Mapping[str, Any]] = [spec]
    # Parts that a model makes itself, such as a student and a teacher, have no dict of their own.
    for key in name.split("."):
        inner = nodes[-1].get(key)
        if isinstance(inner, Mapping):
            path += f".{key}"
            nodes.append(dict(inner))
    return path, nodes
