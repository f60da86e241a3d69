"""What the predictions cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.evaluator import BaseMetric

from patchreg.registry import METRICS
from patchreg.utils.errors import DataError


@METRICS.register_module()
class CostMetric(BaseMetric):
    """Multiply-accumulates of the evaluated images: mean, extremes, and ratio to the dense twin.

    Every image weighs the same, whatever batch it was in; duplicates that fill up the last batch of
    a distributed evaluation are dropped.

    Args:
        unit: Multiply-accumulates per reported unit; 1e9 reports GMACs.
        collect_device: Where results of several processes meet, `cpu` or `gpu`.
        prefix: Prefix of the reported names.

    Differs from official:
        There costs are averaged over batches, which over-weighs a short last one.
    """

    default_prefix = "cost"

    def __init__(
        self, unit: float = 1e9, collect_device: str = "cpu", prefix: str | None = None
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.unit = unit

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Take in the costs of one batch.

        Args:
            data_batch: Not used.
            data_samples: Predictions with `macs` and `dense_macs`.

        Raises:
            DataError: A prediction tells no cost.
        """
        for sample in data_samples:
            if "macs" not in sample:
                raise DataError(
                    "the predictions tell no cost (macs); remove CostMetric from the evaluator"
                )
            self.results.append((float(sample["macs"]), float(sample["dense_macs"])))

    def compute_metrics(self, results: list[tuple[float, float]]) -> dict[str, float]:
        """Summarise the costs of all images.

        Args:
            results: Cost of each image and of its dense twin.
        """
        macs = [item[0] for item in results]
        dense = [item[1] for item in results]
        return {
            "macs": sum(macs) / len(macs) / self.unit,
            "macs_min": min(macs) / self.unit,
            "macs_max": max(macs) / self.unit,
            "dense_macs": sum(dense) / len(dense) / self.unit,
            "ratio": sum(macs) / sum(dense),
        }
