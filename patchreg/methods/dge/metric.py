"""How the Dynamic Grained Encoder spreads its regions over the granularities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric

from patchreg.registry import METRICS
from patchreg.utils.errors import DataError


@METRICS.register_module()
class DGEGranularityMetric(BaseMetric):
    """Share of the regions that chose each candidate, over all images: in all and block by block.

    Args:
        splits: Candidates of the backbone, for the names; `s4` is the share queried at 4 x 4.
        per_block: Report every block too.
        collect_device: Where results of several processes meet, `cpu` or `gpu`.
        prefix: Prefix of the reported names.
    """

    default_prefix = "granularity"

    def __init__(
        self,
        splits: Sequence[int] = (4, 2, 1),
        per_block: bool = True,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.splits = tuple(splits)
        self.per_block = per_block

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Take in one batch.

        Args:
            data_batch: Not used.
            data_samples: Predictions with `granularity`.

        Raises:
            DataError: A prediction has no `granularity`, or one of other candidates.
        """
        for sample in data_samples:
            histogram = sample.get("granularity")
            if histogram is None or histogram.shape[-1] != len(self.splits):
                found = "none" if histogram is None else f"{histogram.shape[-1]} candidates"
                raise DataError(
                    f"the metric counts splits {list(self.splits)} but the predictions tell "
                    f"{found}; set its `splits` to the backbone's, or remove it for a plain model"
                )
            self.results.append(histogram)

    def compute_metrics(self, results: list[torch.Tensor]) -> dict[str, float]:
        """Average over images.

        Args:
            results: One [routed blocks, S] histogram per image.
        """
        mean = torch.stack(results).double().mean(0)
        names = [f"s{split}" for split in self.splits]
        metrics = dict(zip(names, mean.mean(0).tolist(), strict=True))
        if self.per_block:
            for index, row in enumerate(mean.tolist()):
                metrics.update(
                    {f"block{index}_{name}": value for name, value in zip(names, row, strict=True)}
                )
        return metrics
