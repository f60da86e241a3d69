"""What metrics on features share: the features of a data set, and how a loop asks for a metric.

Letters: N images, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.evaluator import BaseMetric
from torch import Tensor

from patchreg.utils.errors import ConfigError, DataError


@dataclass(eq=False)
class FeatureSet:
    """Features of the images of a data set, in its order.

    Args:
        features: A tensor, or an array that may be mapped from a file.
        labels: Class of each image, or None.
        meta: `metainfo` of the data set: what a metric needs to know of it, such as a ground truth.

    Shape:
        features [N, D] floating; labels [N] int64.
    """

    features: Tensor | np.ndarray
    labels: Tensor | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    def tensor(self) -> Tensor:
        """Return all features as a tensor on the device of the run."""
        found = self.features
        if not isinstance(found, Tensor):
            found = torch.from_numpy(np.array(found))
        return found.to(get_device())


class FeatureMetric(BaseMetric):
    """Base of the metrics that compare whole sets of features; used by `FeatureTestLoop`.

    Args:
        prefix: Prefix of the reported names.
    """

    def __init__(self, prefix: str | None = None) -> None:
        super().__init__(prefix=prefix)

    def measure(self, sets: dict[str, FeatureSet]) -> dict[str, Any]:
        """Compute the metric; called on all processes, with all features.

        Args:
            sets: Features by name: `test`, and `bank`, `distractor`, `whitening` where configured.
        """
        raise NotImplementedError

    def report(self, sets: dict[str, FeatureSet]) -> dict[str, Any]:
        """Return the metric under its prefixed names.

        Args:
            sets: As for `measure`.
        """
        prefix = f"{self.prefix}/" if self.prefix else ""
        return {f"{prefix}{name}": value for name, value in self.measure(sets).items()}

    def need(self, sets: Mapping[str, FeatureSet], name: str) -> FeatureSet:
        """Return one of the sets.

        Args:
            sets: Features by name.
            name: Which one.

        Raises:
            ConfigError: The loop was not told to make it.
        """
        if name not in sets:
            raise ConfigError(
                f"{type(self).__name__} needs the features of another set of images: give "
                f"test_cfg.{name}_dataloader"
            )
        return sets[name]

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Refuse single batches.

        Args:
            data_batch: Not used.
            data_samples: Not used.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"{type(self).__name__} compares whole sets of features; set test_cfg.type to "
            "'FeatureTestLoop'"
        )

    def compute_metrics(self, results: list) -> dict:
        """Refuse, as `process` does.

        Args:
            results: Not used.

        Raises:
            DataError: Always.
        """
        raise DataError(f"{type(self).__name__} is evaluated by FeatureTestLoop")
