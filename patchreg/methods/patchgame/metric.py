"""How often messages and images find each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.evaluator import BaseMetric

from patchreg.registry import METRICS


@METRICS.register_module()
class PatchGameMatchMetric(BaseMetric):
    """In-batch matching accuracy of message to image and image to message, in percent, and its chance.

    Source:
        `accuracy` in the epoch routine of the official `train.py`; here on a test set.

    Args:
        topk: The true partner counts when it is among so many.
        collect_device: As for MMEngine.
        prefix: Prefix of the reported names.
    """

    default_prefix = "match"

    def __init__(
        self,
        topk: Sequence[int] = (1, 5),
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.topk = tuple(topk)

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Note where the true partners stand.

        Args:
            data_batch: Not used.
            data_samples: What `PatchGamePretrainer.predict` returned.
        """
        self.results += [
            (sample["match_place"].tolist(), int(sample["match_count"])) for sample in data_samples
        ]

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Return the accuracies.

        Args:
            results: Places and batch size of every image.
        """
        places = [place for pair, _ in results for place in pair]
        metrics = {
            f"top{k}": 100.0 * sum(place < k for place in places) / len(places) for k in self.topk
        }
        metrics["chance"] = 100.0 * sum(1 / count for _, count in results) / len(results)
        return metrics
