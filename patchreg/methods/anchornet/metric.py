"""Collecting a confidence table over a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric

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
            parts = (sample["view_logits"], sample["view_seen"], sample["gt_label"].reshape(()))
            self.results.append(tuple(part.cpu() for part in parts))

    def compute_metrics(self, results: list[tuple[Any, ...]]) -> dict[str, float]:
        """Build the table and summarise it.

        Args:
            results: Logits, presence and label of each image, in the order of the data set.
        """
        views, seen, labels = (torch.stack(part) for part in zip(*results))
        self.table = ConfidenceTable.from_logits(
            views,
            labels,
            self.costs or tuple(float(stage + 1) for stage in range(views.shape[1])),
            None if bool(seen.all()) else seen,
            self.keep_logits,
        )
        top = self.table.logits if self.table.logits is not None else views.cumsum(1)
        best = top[:, -1].topk(min(5, top.shape[2])).indices
        metrics = {
            f"stage{stage}_top1": 100.0 * self.table.correct[:, stage].double().mean().item()
            for stage in range(self.table.stages)
        }
        return {
            **metrics,
            "top1": metrics[f"stage{self.table.stages - 1}_top1"],
            "top5": 100.0 * (best == labels[:, None]).any(1).double().mean().item(),
            "confidence": self.table.confidence[:, -1].double().mean().item(),
        }
