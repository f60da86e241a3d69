"""Collecting a confidence table over a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor

from patchreg.methods.anchornet.table import ConfidenceTable
from patchreg.registry import METRICS
from patchreg.utils.errors import DataError


@METRICS.register_module()
class AnchorNetTableMetric(BaseMetric):
    """Accuracy and mean confidence at every stage; keeps the table that they come from.

    Source:
        `make_table.py` of the official repository.

    Args:
        keep_logits: Whether the table keeps the logits, for calibration; 4 bytes per image, stage and
            class.
        collect_device: Where results of several processes meet, `cpu` or `gpu`.
        prefix: Prefix of the reported names.

    Differs from official:
        Predicted classes and labels are kept, not only correctness.
    """

    default_prefix = "table"

    def __init__(
        self, keep_logits: bool = True, collect_device: str = "cpu", prefix: str | None = None
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.keep_logits = keep_logits
        self.table: ConfidenceTable | None = None
        self.costs: tuple[float, ...] | None = None

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Take in one batch.

        Args:
            data_batch: Not used.
            data_samples: Predictions with `view_logits`, `view_seen` and `gt_label`.

        Raises:
            DataError: A prediction has no logits of its views, or no label.
        """
        for sample in data_samples:
            if "view_logits" not in sample:
                raise DataError(
                    "the predictions hold no logits of all views: a table needs an "
                    "AnchorNetEnsembleClassifier with thresholds=None"
                )
            if "gt_label" not in sample:
                raise DataError("an image has no label; a table needs a labelled data set")
            self.results.append(self._row(sample))

    def _row(self, sample: dict) -> dict[str, Tensor]:
        """Return the row of one image; logits only when they are kept, they are large."""
        views, seen = sample["view_logits"].cpu(), sample["view_seen"].cpu()
        label = sample["gt_label"].reshape(1).cpu()
        costs = [float(stage + 1) for stage in range(len(views))]
        row = ConfidenceTable.from_logits(views[None], label, costs, seen[None])
        assert row.logits is not None
        assert row.predicted is not None
        best = row.logits[0, -1].topk(min(5, row.logits.shape[2])).indices
        parts = {
            "confidence": row.confidence[0],
            "correct": row.correct[0],
            "predicted": row.predicted[0],
            "labels": label[0],
            "views": seen.sum(),
            "top5": (best == label).any(),
        }
        return {**parts, "logits": row.logits[0]} if self.keep_logits else parts

    def compute_metrics(self, results: list[dict[str, Tensor]]) -> dict[str, float]:
        """Build the table and summarise it.

        Args:
            results: Row of each image, in the order of the data set.
        """
        parts: dict[str, Any] = {
            name: torch.stack([row[name] for row in results]) for name in results[0]
        }
        top5 = parts.pop("top5").double().mean().item()
        stages = parts["confidence"].shape[1]
        if bool((parts["views"] == stages).all()):
            del parts["views"]
        costs = self.costs or tuple(float(stage + 1) for stage in range(stages))
        self.table = ConfidenceTable(**parts, costs=costs)
        metrics = {
            f"stage{stage}_top1": 100.0 * self.table.correct[:, stage].double().mean().item()
            for stage in range(stages)
        }
        return {
            **metrics,
            "top1": metrics[f"stage{stages - 1}_top1"],
            "top5": 100.0 * top5,
            "confidence": self.table.confidence[:, -1].double().mean().item(),
        }
