"""Trained models from Python: `patchreg.load(config, checkpoint)`.

    import patchreg

    model = patchreg.load("dge/quick")
    for prediction in model.predict("photos"):
        print(prediction.name, prediction.confidence, prediction.record["macs"])
    model.select("photos").boxes
    model.features("photos")

Letters: B images, K classes, D width of a feature vector.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import Tensor, nn

import patchreg
from patchreg.models.features import as_tokens, pool_tokens
from patchreg.registry import HOOKS, MODELS
from patchreg.runner.build import (
    EngineRunner,
    config_errors,
    default_work_dir,
    latest_checkpoint,
    load_config,
    resolve_checkpoint,
)
from patchreg.runner.checkpoint import load_parts, load_state
from patchreg.runner.picture import TEST, ImageReader, model_classes
from patchreg.runner.predict import Prediction, predict_batch
from patchreg.structures import PatchSelection
from patchreg.utils.errors import ConfigError, DataError, MissingFileError, did_you_mean
from patchreg.utils.weights import how_to_get, load_file, state_dict_of

SHIPPED = "checkpoints"
"""Folder beside a config with small trained checkpoints, one `<leaf>.pth` for a config `<leaf>.py`."""


def load(
    config: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    budget: float | None = None,
    device: str | torch.device | None = None,
    options: Mapping[str, Any] | None = None,
) -> Model:
    """Load a trained model.

    Args:
        config: Config file, or a short name such as `dge/quick`, see `find_config`.
        checkpoint: Checkpoint, or folder of a run for its newest one. None takes the one that ships
            with the config, else what the config itself names.
        budget: Mean cost of an image that the model may take, in its own unit (multiply-accumulates), for
            models that have such a knob.
        device: Where the model runs; None takes a GPU if there is one.
        options: Overrides of the config by dotted key, as `--cfg-options` gives them.

    Raises:
        UserError: The config or checkpoint is missing, damaged or of another model; says what to do.
    """
    path = find_config(config)
    checkpoint = find_checkpoint(path, options) if checkpoint is None else os.fspath(checkpoint)
    # The named checkpoint takes the place of the one that the config would load.
    options = {**(options or {}), "load_from": checkpoint and resolve_checkpoint(checkpoint)}
    # Parts of the model may name checkpoints of earlier stages, which a whole checkpoint replaces.
    parsed = load_config(path, options, moved={"work_dirs": "work_dirs"})
    if "model" not in parsed:
        raise ConfigError(
            f"'{path}' has no model of its own but {len(parsed.stages)} stages; use the config of one: "
            + ", ".join(_beside(path, stage) for stage in parsed.stages)
        )
    network, classes = _load(parsed, checkpoint, device)
    if budget is not None:
        _set_budget(network, budget, parsed.load_from)
    return Model(network, parsed, parsed.load_from, classes)


def config_folders() -> list[Path]:
    """Return where configs are looked for: `configs` here, in the checkout, and in the installed package."""
    package = Path(patchreg.__file__).resolve().parent
    return [Path("configs"), package.parent / "configs", package / "configs"]


def find_config(name: str | os.PathLike[str]) -> str:
    """Return the file of a config.

    Args:
        name: A path; or `<method>/<leaf>`, such as `dge/quick`, for `configs/<method>/<leaf>.py` in the
            current folder, in the checkout of this package, or among the configs installed with it.

    Raises:
        MissingFileError: There is no such config; says which are near.
    """
    path = os.fspath(name)
    if os.path.isfile(path):
        return path
    leaf = Path(path.removesuffix(".py") + ".py")
    if leaf.parts[0] == "configs":
        leaf = Path(*leaf.parts[1:])
    for folder in config_folders():
        if not leaf.is_absolute() and (folder / leaf).is_file():
            return str(folder / leaf)
    known = {
        str(file.relative_to(folder).with_suffix(""))
        for folder in config_folders()
        for file in folder.glob("*/*.py")
        if not file.name.startswith("_") and not file.parent.name.startswith("_")
    }
    near = did_you_mean(str(leaf.with_suffix("")), sorted(known))
    raise MissingFileError(
        f"config '{path}' does not exist.{near} Give a path, or the name of one that ships with patchreg, "
        "such as dge/quick"
    )


def shipped_checkpoint(path: str | os.PathLike[str]) -> str | None:
    """Return the small trained checkpoint that ships with a config, or None.

    Args:
        path: Config file.
    """
    file = Path(path).parent / SHIPPED / f"{Path(path).stem}.pth"
    return str(file) if file.is_file() else None


def find_checkpoint(
    path: str | os.PathLike[str], options: Mapping[str, Any] | None = None
) -> str | None:
    """Return the checkpoint of a config of which none was named.

    That is the one that ships with the config, else its `load_from` if that exists.

    Args:
        path: Config file.
        options: Overrides by dotted key.

    Returns:
        The file, or None: the parts of the model may have weights of their own.
    """
    shipped = shipped_checkpoint(path)
    if shipped is not None:
        return shipped
    if options and options.get("load_from"):
        return str(options["load_from"])
    stated = _stated(path)
    return stated if stated and os.path.isfile(resolve_checkpoint(stated)) else None


def _stated(path: str | os.PathLike[str]) -> str | None:
    """Return the checkpoint that a config names, whether it exists or not."""
    with config_errors(f"config '{path}' cannot be read"):
        return Config.fromfile(path, import_custom_modules=False).get("load_from")


def load_model(
    config: Config, checkpoint: str | None, device: str | torch.device | None = None
) -> Any:
    """Build the model of a config for evaluation, load its weights and prepare it as a test does.

    A hook of the config that has a method `prepare_model` gets to see the model, as before a test.

    Args:
        config: What `load_config` returned.
        checkpoint: Checkpoint, or folder of a run for its newest one. None takes the one that ships with
            the config; without one, all parts of the model have to name weights of their own.
        device: Where the model runs; None takes a GPU if there is one.

    Raises:
        UserError: The model cannot be built, or the checkpoint is missing or of another model.
    """
    if checkpoint is None and config.filename:
        checkpoint = shipped_checkpoint(config.filename)
    return _load(config, checkpoint, device)[0]


def _load(
    config: Config, checkpoint: str | None, device: str | torch.device | None
) -> tuple[Any, list[str]]:
    """Return the model of a config with its weights, and the classes it was trained for, if the file tells."""
    init_default_scope(config.get("default_scope", "patchreg"))
    parts = copy.deepcopy(config.model)
    if config.get("data_preprocessor") is not None:
        parts.setdefault("data_preprocessor", config.data_preprocessor)
    with config_errors(f"the model of '{config.filename}' cannot be built"):
        model = MODELS.build(parts)
    classes: list[str] = []
    if checkpoint is None:
        _needs_none(model, config)
        load_parts(model, strict=True)
    else:
        path = resolve_checkpoint(checkpoint)
        # A model may know other layouts of its checkpoints, as in a run.
        read = getattr(model, "read_checkpoint", None)
        loaded = load_file(path) if read is None else {}
        if read is None:
            _skip_covered(model, state_dict_of(loaded, path))
        load_parts(model)
        if read is not None:
            loaded = read(path)
        load_state(model, state_dict_of(loaded, path), path, strict=True)
        meta = loaded.get("meta")
        if isinstance(meta, Mapping):
            classes = list((meta.get("dataset_meta") or {}).get("classes") or ())
    # A model that was loaded can be a part of another one.
    model.is_trained = True
    model = model.to(get_device() if device is None else device).eval()
    for hook in config.get("custom_hooks") or ():
        if hasattr(HOOKS.get(hook["type"]), "prepare_model"):
            HOOKS.build(hook).prepare_model(_Evaluation(config, model))
    return model, classes


def _pretrained(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Return the parts of a model that name weights of their own, with their prefix."""
    for name, part in model.named_modules():
        config = getattr(part, "init_cfg", None)
        if isinstance(config, Mapping) and config.get("type") == "Pretrained":
            yield f"{name}." if name else "", part


def _skip_covered(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Let parts be that the checkpoint fills completely: the files they name are not needed."""
    for prefix, part in list(_pretrained(model)):
        if all(prefix + key in state for key in part.state_dict()):
            part.init_cfg = None


def _needs_none(model: nn.Module, config: Config) -> None:
    """Refuse a model with weights that nothing would load."""
    prefixes = tuple(prefix for prefix, _ in _pretrained(model))
    prefixes += tuple(
        f"{name}." for name, part in model.named_modules() if getattr(part, "is_trained", False)
    )
    bare = [name for name, _ in model.named_parameters() if not name.startswith(prefixes or ("-",))]
    if not bare:
        return
    run = default_work_dir(config.filename or "model.py")
    text = f"no checkpoint was named, and none ships with '{config.filename}': "
    if latest_checkpoint(run):
        raise MissingFileError(f"{text}there is a run of yours in '{run}', so pass '{run}'")
    if config.get("train_cfg") is None:
        stated = _stated(config.filename) if config.filename else None
        hint = f" ('{stated}'; {how_to_get(stated)})" if stated else ""
        raise MissingFileError(f"{text}it trains nothing; pass the checkpoint it evaluates{hint}")
    raise MissingFileError(
        f"{text}train one with: python tools/train.py {config.filename}, then pass '{run}'"
    )


def _beside(path: str, stage: str) -> str:
    return str(Path(path).parent / stage)


def _set_budget(network: Any, budget: float, checkpoint: str | None) -> None:
    kind = type(network).__name__
    if hasattr(network, "set_budget") and checkpoint is not None:
        network.set_budget(budget, checkpoint)
        return
    text = f"budget={budget}: {kind} has no budget that can be set for single images"
    if hasattr(network, "budget"):
        text += "; its mean share of the dense cost is part of the config: model.budget=0.5"
    raise ConfigError(text)


class _Evaluation:
    """As much of a runner as hooks need to prepare a model for evaluation."""

    def __init__(self, config: Config, model: Any) -> None:
        self.cfg = config
        self.model = model
        self.seed = 0
        self.logger = MMLogger.get_current_instance()
        self.build_dataloader = EngineRunner.build_dataloader

    @cached_property
    def test_dataloader(self) -> Any:
        """Loader of the test set."""
        with config_errors("the test data cannot be read"):
            return self.build_dataloader(self.cfg.test_dataloader, seed=self.seed)


class Model:
    """A trained model, ready to look at images of any form.

    Images are files, folders, PIL images, arrays or tensors, alone or as lists, see
    `patchreg.runner.picture.FORMS`; `test` means the test set of the config. All go through the test
    pipeline of the config. Answers are in the order of the images.

    Images that have one size behind the pipeline share a batch, unless the model stops early: then
    each image stops for itself.

    Args:
        network: The model itself, in evaluation mode.
        config: Its config.
        checkpoint: Where its weights came from, or None.
        classes: Names of the classes it was trained for; empty takes those of the config's test set.
    """

    def __init__(
        self, network: Any, config: Config, checkpoint: str | None, classes: list[str]
    ) -> None:
        self.network = network
        self.config = config
        self.checkpoint = checkpoint
        self._trained_classes = classes

    def __repr__(self) -> str:
        return (
            f"Model({type(self.network).__name__}, config='{self.config.filename}', "
            f"checkpoint={self.checkpoint!r}, device='{self.device}')"
        )

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.network.data_preprocessor.device

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes, by label; empty where nothing tells them."""
        return self._trained_classes or model_classes(self.config)

    def predict(
        self, images: Any, *, top: int = 5, count: int | None = None, batch_size: int = 32
    ) -> list[Prediction]:
        """Classify images.

        Args:
            images: Images of any form.
            top: How many classes the record of an image names, at least 1.
            count: How many images at most, of a test set evenly spread; None for all.
            batch_size: How many images at once, at least 1.

        Returns:
            One prediction per image.

        Raises:
            UserError: An image cannot be used, or the model does not classify.
        """
        _at_least_one(top=top, count=count, batch_size=batch_size)
        if isinstance(images, str) and images == TEST:
            self._check_test_classes()
        classes = self.classes

        def answer(samples: list[dict[str, Any]]) -> list[Prediction]:
            return predict_batch(self.network, samples, classes, top)

        return self._run(images, count, batch_size, answer)

    def select(
        self, images: Any, *, count: int | None = None, batch_size: int = 32
    ) -> PatchSelection:
        """Say where the model looks.

        Args:
            images: Images of any form.
            count: How many images at most, of a test set evenly spread; None for all.
            batch_size: How many images at once, at least 1.

        Returns:
            One selection of B images, on the CPU.

        Raises:
            UserError: An image cannot be used, the model does not select, or images have different sizes
                behind the pipeline.
        """
        _at_least_one(count=count, batch_size=batch_size)
        if not hasattr(self.network, "select"):
            raise ConfigError(f"{type(self.network).__name__} selects no patches")

        def answer(samples: list[dict[str, Any]]) -> list[PatchSelection]:
            found = self.network.select(self._inputs(samples)).to("cpu")
            return [found[index] for index in range(len(found))]

        found = self._run(images, count, batch_size, answer)
        sizes = {one.image_size for one in found}
        if len(sizes) > 1:
            raise DataError(
                f"images have different sizes behind the test pipeline, such as {sorted(sizes)[:3]} "
                "(height, width); ask for those of one size at a time"
            )
        return PatchSelection.cat(found)

    def features(self, images: Any, *, count: int | None = None, batch_size: int = 32) -> Tensor:
        """Return one vector per image.

        A model that is made for features (`features(inputs)`) gives them; of a classifier it is the class
        token, or the mean of the patches where its head reads no class token.

        Args:
            images: Images of any form.
            count: How many images at most, of a test set evenly spread; None for all.
            batch_size: How many images at once, at least 1.

        Shape:
            Returns [B, D] float32, on the CPU.

        Raises:
            UserError: An image cannot be used, or the model gives no features.
        """
        _at_least_one(count=count, batch_size=batch_size)
        make = features_of(self.network)

        def answer(samples: list[dict[str, Any]]) -> list[Tensor]:
            return list(make(self._inputs(samples)).float().cpu())

        return torch.stack(self._run(images, count, batch_size, answer))

    def batches(
        self, images: Any, *, count: int | None = None, batch_size: int = 32
    ) -> Iterator[Tensor]:
        """Return images as the network takes them, for use with `network` itself.

        Args:
            images: Images of any form; all of one size behind the pipeline.
            count: How many images at most, of a test set evenly spread; None for all.
            batch_size: How many images at once, at least 1.

        Shape:
            Gives normalised [B, 3, H, W] float32 on the model's device.

        Raises:
            UserError: An image cannot be used.
        """
        _at_least_one(count=count, batch_size=batch_size)
        for _, samples in self._grouped(images, count, batch_size):
            yield self._inputs(samples)

    def _inputs(self, samples: list[dict[str, Any]]) -> Tensor:
        batch = default_collate([dict(inputs=sample["inputs"]) for sample in samples])
        return self.network.data_preprocessor(batch, False)["inputs"]

    @torch.no_grad()
    def _run(
        self, images: Any, count: int | None, batch_size: int, answer: Callable[[list], list]
    ) -> list[Any]:
        """Return the answers to all images in their order."""
        found: dict[int, Any] = {}
        for places, samples in self._grouped(images, count, batch_size):
            found.update(zip(places, answer(samples), strict=True))
        return [found[place] for place in range(len(found))]

    def _grouped(
        self, images: Any, count: int | None, batch_size: int
    ) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
        """Return samples of one size together, with their places among all images."""
        reader = ImageReader(self.config, getattr(self.network, "img_size", None))
        if hasattr(self.network, "exit_early"):
            batch_size = 1
        waiting: dict[tuple[int, ...], list[tuple[int, dict[str, Any]]]] = {}
        for place, sample in enumerate(reader.read(images, count)):
            shape = tuple(sample["inputs"].shape)
            waiting.setdefault(shape, []).append((place, sample))
            if len(waiting[shape]) == batch_size:
                places, samples = zip(*waiting.pop(shape))
                yield list(places), list(samples)
        for group in waiting.values():
            places, samples = zip(*group)
            yield list(places), list(samples)

    def _check_test_classes(self) -> None:
        here = model_classes(self.config)
        if self._trained_classes and here and here != self._trained_classes:
            raise DataError(
                f"the model was trained for {', '.join(self._trained_classes[:3])}, ..., but the test set "
                f"found here has {', '.join(here[:3])}, ...; prepare the data of "
                f"'{self.config.filename}' with tools/prepare_data.py, or name images"
            )


def features_of(network: Any) -> Callable[[Tensor], Tensor]:
    """Return the function that gives one feature vector per image.

    Args:
        network: A model: one that makes features, or a classifier of a backbone and a head.

    Shape:
        The function takes [B, 3, H, W] and returns [B, D].

    Raises:
        ConfigError: The model is neither.
    """
    if callable(getattr(network, "features", None)):
        return network.features
    if hasattr(network, "extract") and hasattr(network, "head"):
        return lambda inputs: pooled(network, network.extract(inputs))
    raise ConfigError(
        f"{type(network).__name__} gives no features: it is no single backbone; load the config of one of "
        "its stages"
    )


def pooled(network: Any, extracted: Any) -> Tensor:
    """Return one vector per image from what a model extracts: the class token, or the mean of the patches.

    Args:
        network: The model; its head says which of the two it reads.
        extracted: What its `extract` returned.

    Shape:
        Returns [B, D].
    """
    return pool_tokens(
        as_tokens(extracted), getattr(getattr(network, "head", None), "pool", "auto")
    )


def _at_least_one(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: expected at least 1")
