"""Video object segmentation: region similarity J, contour accuracy F and their statistics.

Letters: O objects, T frames, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor
from torch.nn import functional as F

from patchreg.registry import METRICS
from patchreg.utils.errors import DataError


def region_similarity(truth: Tensor, predicted: Tensor) -> Tensor:
    """Return the intersection over union J of masks; 1 where both are empty.

    Source:
        Perazzi et al., "A benchmark dataset and evaluation methodology for video object
        segmentation" (CVPR 2016); `db_eval_iou` of davis2017-evaluation.

    Args:
        truth: True masks.
        predicted: Predicted masks.

    Shape:
        truth, predicted [..., H, W] bool; returns [...] float64.
    """
    both = (truth & predicted).sum(dim=(-2, -1)).double()
    either = (truth | predicted).sum(dim=(-2, -1)).double()
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(either))


def boundary(masks: Tensor) -> Tensor:
    """Return the pixels whose right, lower or lower right neighbour has another value.

    Source:
        `_seg2bmap` of davis2017-evaluation.

    Args:
        masks: Masks.

    Shape:
        masks [N, H, W] bool; returns the same.
    """
    padded = F.pad(masks[:, None].float(), (0, 1, 0, 1), mode="replicate")[:, 0].bool()
    right, low, corner = padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]
    # Outside of the image there is nothing to differ from: the last row looks to the right only,
    # the last column down only, the corner nowhere.
    return (masks ^ right) | (masks ^ low) | (masks ^ corner)


def dilate(masks: Tensor, radius: int) -> Tensor:
    """Grow masks by a disk.

    Args:
        masks: Masks.
        radius: Radius of the disk in px.

    Shape:
        masks [N, H, W] bool; returns the same.
    """
    offset = torch.arange(-radius, radius + 1, device=masks.device)
    disk = (offset[:, None] ** 2 + offset[None] ** 2 <= radius**2).float()[None, None]
    return F.conv2d(masks[:, None].float(), disk, padding=radius)[:, 0] > 0.5


def contour_accuracy(truth: Tensor, predicted: Tensor, tolerance: float = 0.008) -> Tensor:
    """Return the F measure of the boundaries of masks, matched within a tolerance.

    Source:
        `db_eval_boundary` of davis2017-evaluation.

    Args:
        truth: True masks.
        predicted: Predicted masks.
        tolerance: Share of the image's diagonal, rounded up to whole px.

    Shape:
        truth, predicted [N, H, W] bool; returns [N] float64.
    """
    height, width = truth.shape[-2:]
    radius = math.ceil(tolerance * math.hypot(height, width))
    true_edge, edge = boundary(truth), boundary(predicted)
    true_count, count = (part.sum(dim=(1, 2)).double() for part in (true_edge, edge))
    precise = (edge & dilate(true_edge, radius)).sum(dim=(1, 2)).double()
    recalled = (true_edge & dilate(edge, radius)).sum(dim=(1, 2)).double()
    # An empty prediction makes no mistake, an empty truth misses nothing.
    precision = torch.where(count > 0, precise / count.clamp(min=1), torch.ones_like(count))
    recall = torch.where(
        true_count > 0, recalled / true_count.clamp(min=1), torch.ones_like(true_count)
    )
    total = precision + recall
    return torch.where(
        total > 0, 2 * precision * recall / total.clamp(min=1e-12), torch.zeros_like(total)
    )


def statistics(values: Tensor) -> tuple[float, float, float]:
    """Return mean, recall (share above 0.5) and decay (first minus last quarter) over frames.

    Source:
        `db_statistics` of davis2017-evaluation.

    Args:
        values: Measure of each frame, in order.

    Shape:
        values [T].
    """
    count = len(values)
    edges = [int(x) - 1 for x in np.round(np.linspace(1, count, 5) + 1e-10)]
    first = values[edges[0] : edges[1] + 1].mean()
    last = values[edges[3] : edges[4] + 1].mean()
    return values.mean().item(), (values > 0.5).double().mean().item(), (first - last).item()


def score_objects(truth: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Return J and F of every object in every frame.

    Args:
        truth: True masks.
        predicted: Predicted masks.

    Shape:
        truth, predicted [O, T, H, W] bool; returns two [O, T] float64.
    """
    pairs = zip(truth, predicted, strict=True)
    contours = torch.stack([contour_accuracy(true, found) for true, found in pairs])
    return region_similarity(truth, predicted), contours


def split_objects(truth: Tensor, predicted: Tensor, name: str = "") -> tuple[Tensor, Tensor]:
    """Split maps of object numbers into one mask per object of the first frame.

    Args:
        truth: True object numbers, 0 for the background.
        predicted: Predicted object numbers.
        name: Name of the sequence, for messages.

    Shape:
        truth, predicted [T, H, W] integer; returns two [O, T, H, W] bool.

    Raises:
        DataError: There is no object in the first frame, or the prediction holds numbers that the
            truth has not.
    """
    objects = int(truth[0].max())
    if objects == 0:
        raise DataError(f"sequence '{name}': the first frame's mask holds no object")
    if int(truth.max()) > objects:
        raise DataError(
            f"sequence '{name}': later masks hold object {int(truth.max())}, the first frame only "
            f"1 to {objects}; only objects of the first frame can be followed"
        )
    if int(predicted.max()) > objects:
        raise DataError(
            f"sequence '{name}': object {int(predicted.max())} is predicted, but there are only "
            f"{objects}"
        )
    numbers = torch.arange(1, objects + 1, device=truth.device)[:, None, None, None]
    return truth[None] == numbers, predicted[None] == numbers


@METRICS.register_module()
class DavisMetric(BaseMetric):
    """J, F and J&F of video object segmentation over all objects, in percent.

    `PropagationTestLoop` gives it the true and the predicted object numbers of each sequence. The
    first and the last frame do not count (semi-supervised protocol). Mean, recall and decay are means
    over objects.

    Source:
        Pont-Tuset et al., "The 2017 DAVIS challenge on video object segmentation";
        davis2017-evaluation.

    Args:
        collect_device: Where results of several processes meet, `cpu` or `gpu`.
        prefix: Prefix of the reported names.
    """

    default_prefix = "davis"

    def __init__(self, collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Score sequences.

        Args:
            data_batch: Not used.
            data_samples: `truth` and `predicted` [T, H, W] and the name of each sequence.

        Raises:
            DataError: A sequence is too short, or its masks do not fit.
        """
        for sample in data_samples:
            name = sample["name"]
            if len(sample["truth"]) < 3:
                raise DataError(
                    f"sequence '{name}' has {len(sample['truth'])} frames; the first and the last "
                    "do not count, so at least 3 are needed"
                )
            truth, predicted = split_objects(sample["truth"], sample["predicted"], name)
            regions, contours = score_objects(truth[:, 1:-1], predicted[:, 1:-1])
            objects = [
                (statistics(region), statistics(contour))
                for region, contour in zip(regions, contours, strict=True)
            ]
            self.results.append(objects)

    def compute_metrics(self, results: list[list[tuple]]) -> dict[str, float]:
        """Average over all objects of all sequences.

        Args:
            results: For each sequence the statistics of J and of F of its objects.
        """
        table = np.array([item for objects in results for item in objects])
        regions, contours = table[:, 0], table[:, 1]
        metrics = {"J&F": 50.0 * (regions[:, 0].mean() + contours[:, 0].mean())}
        for start, table in (("J", regions), ("F", contours)):
            for column, name in enumerate(("mean", "recall", "decay")):
                metrics[f"{start}_{name}"] = 100.0 * float(table[:, column].mean())
        return metrics
