"""Evaluation by features: every image of some data sets through a frozen model, once, then the metrics."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather, barrier, get_dist_info, is_main_process
from mmengine.model import is_model_wrapper
from mmengine.runner import TestLoop
from torch import Tensor
from torch.utils.data import DataLoader

from patchreg.metrics.features import FeatureMetric, FeatureSet
from patchreg.registry import LOOPS
from patchreg.utils.errors import ConfigError
from patchreg.utils.files import replace_safely

SAMPLED_IMAGES, SAMPLED_FILES = 256, 50_000
"""Images in memory, and files, of a data set that go into the key of its features at most."""


@LOOPS.register_module()
class FeatureTestLoop(TestLoop):
    """Make the features of the test set and of further sets, and give them to metrics on features.

    The model needs a method `features(inputs)` that returns one vector per image, as
    `FeatureExtractor` has. With `cache`, features are kept on disk under a key of the model's
    weights, its configuration and the data, and made only once; a cached set is mapped and not read
    into memory.

    Args:
        runner: The runner.
        dataloader: Loader of the test set (queries), or its config.
        evaluator: Metrics that are `FeatureMetric`s, or their config.
        bank_dataloader: Loader of the images to compare with (training set, database).
        distractor_dataloader: Loader of further images of a database that match no query.
        whitening_dataloader: Loader of images to learn a whitening from.
        cache: Folder for features, shared by all evaluations; None keeps nothing.

    Raises:
        ConfigError: The model makes no features, or a metric is of another kind.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        evaluator: Any,
        bank_dataloader: dict | DataLoader | None = None,
        distractor_dataloader: dict | DataLoader | None = None,
        whitening_dataloader: dict | DataLoader | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(runner, dataloader, evaluator)
        loaders = dict(
            bank=bank_dataloader, distractor=distractor_dataloader, whitening=whitening_dataloader
        )
        self.loaders: dict[str, DataLoader] = {"test": self.dataloader}
        for name, loader in loaders.items():
            if loader is not None:
                self.loaders[name] = runner.build_dataloader(loader, seed=runner.seed)
        self.cache = None if cache is None else Path(cache)
        self.model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not callable(getattr(self.model, "features", None)):
            raise ConfigError(
                f"{type(self.model).__name__} has no method 'features(inputs)'; use "
                "model.type='FeatureExtractor' with the backbone to evaluate"
            )
        for metric in self.evaluator.metrics:
            if not isinstance(metric, FeatureMetric):
                raise ConfigError(
                    f"{type(metric).__name__} does not measure features; FeatureTestLoop takes "
                    "metrics such as KNNMetric, RetrievalMetric or CopyDetectionMetric"
                )

    def run(self) -> dict[str, Any]:
        """Make all features and return the metrics."""
        self.runner.call_hook("before_test")
        self.runner.call_hook("before_test_epoch")
        self.model.eval()
        sets = {name: self.extract(name, loader) for name, loader in self.loaders.items()}
        metrics: dict[str, Any] = {}
        for metric in self.evaluator.metrics:
            metrics.update(metric.report(sets))
        self.runner.call_hook("after_test_epoch", metrics=metrics)
        self.runner.call_hook("after_test")
        return metrics

    def extract(self, name: str, loader: DataLoader) -> FeatureSet:
        """Return the features of one set, from the cache where they are.

        Args:
            name: Name of the set, for the log.
            loader: Its loader.
        """
        dataset: Any = loader.dataset
        meta = dict(getattr(dataset, "metainfo", {}))
        labels = None
        if hasattr(dataset, "get_gt_labels"):
            labels = torch.from_numpy(np.asarray(dataset.get_gt_labels(), dtype=np.int64))
        if self.cache is None:
            return FeatureSet(self.compute(name, loader), labels, meta)
        file = self.cache / f"{feature_key(self.model, loader)}.npy"
        if not file.is_file():
            features = self.compute(name, loader)
            if is_main_process():
                save_array(features.cpu().numpy(), file)
            barrier()
        else:
            self.runner.logger.info(f"features of '{name}': {len(dataset)} images from {file}")
        return FeatureSet(np.load(file, mmap_mode="r"), labels, meta)

    @torch.inference_mode()
    def compute(self, name: str, loader: DataLoader) -> Tensor:
        """Run the model over one set.

        Args:
            name: Name of the set, for the log.
            loader: Its loader.

        Shape:
            Returns [N, D] float32, in the order of the data set, on all processes.
        """
        start = time.perf_counter()
        found = []
        for index, batch in enumerate(loader):
            data = self.model.data_preprocessor(batch, False)
            found.append(self.model.features(data["inputs"]).float().cpu())
            if (index + 1) % 50 == 0:
                rate = (index + 1) / (time.perf_counter() - start)
                left = (len(loader) - index - 1) / rate
                self.runner.logger.info(
                    f"features of '{name}': {index + 1}/{len(loader)} batches, eta {left:.0f} s"
                )
        features = torch.cat(found)
        _, world = get_dist_info()
        if world > 1:
            # Process p holds samples p, p + world, ...; the last ones are repeated to fill up.
            features = torch.stack(all_gather(features), dim=1).flatten(0, 1)
        features = features[: len(loader.dataset)]  # type: ignore[arg-type]
        seconds = time.perf_counter() - start
        self.runner.logger.info(
            f"features of '{name}': {len(features)} images, width {features.shape[1]}, "
            f"{len(features) / seconds:.0f} images/s"
        )
        return features


def feature_key(model: Any, loader: DataLoader) -> str:
    """Return a key of a model, its weights and a data set, equal exactly when their features are.

    All weights and labels are hashed, and of the images, at most some evenly spread ones: their
    pixels where they lie in memory, else path, size and time of change of their files.

    Args:
        model: The model.
        loader: Loader of the data set.
    """
    found = hashlib.sha256()
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        plain = value.detach().cpu().contiguous().flatten()
        found.update(plain.view(torch.uint8).numpy().tobytes())
    dataset: Any = loader.dataset
    facts = dict(
        model=[
            [name, type(part).__name__, _settings(part)] for name, part in model.named_modules()
        ],
        dataset=type(getattr(dataset, "dataset", dataset)).__name__,
        pipeline=repr(getattr(dataset, "pipeline", None)),
        count=len(dataset),
    )
    found.update(json.dumps(facts, sort_keys=True).encode())
    if hasattr(dataset, "get_gt_labels"):
        found.update(np.asarray(dataset.get_gt_labels()).tobytes())
    most = SAMPLED_IMAGES if "img" in dataset.get_data_info(0) else SAMPLED_FILES
    for index in np.unique(np.linspace(0, len(dataset) - 1, most).astype(int)):
        found.update(_identity(dataset.get_data_info(int(index))))
    return found.hexdigest()[:32]


def _settings(part: Any) -> dict[str, Any]:
    """Return what a module was told besides weights, such as its number of heads."""
    return {
        key: value
        for key, value in vars(part).items()
        if not key.startswith("_") and key != "training" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def _identity(info: dict[str, Any]) -> bytes:
    """Return what tells one image from another without decoding it."""
    if "img" in info:
        return np.ascontiguousarray(info["img"]).tobytes()
    facts = {
        key: value for key, value in info.items() if isinstance(value, (str, int, float, list))
    }
    path = info.get("img_path")
    stamp = os.stat(path) if path is not None else None
    if stamp is not None:
        facts["stamp"] = [stamp.st_size, stamp.st_mtime_ns]
    return json.dumps(facts, sort_keys=True, default=str).encode()


def save_array(values: np.ndarray, path: Path) -> None:
    """Write an array under a temporary name, then rename it.

    Args:
        values: The array.
        path: File; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.save(file, values)
    replace_safely(partial, path)
