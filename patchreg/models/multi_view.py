"""From what `MultiView` packs to what a model of several views takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchreg.models.preprocessor import ImagePreprocessor
from patchreg.registry import MODELS
from patchreg.structures import ViewGeometry
from patchreg.transforms.photometry import apply_to_batch


@MODELS.register_module()
class MultiViewPreprocessor(ImagePreprocessor):
    """Move views to the device, change their colours if that is still to do, and normalise them.

    Batches without views (evaluation) go through `ImagePreprocessor`.

    Args:
        mean: Mean per RGB channel, in [0, 255].
        std: Standard deviation per RGB channel, in the same unit.
        non_blocking: Copy to the device without waiting (with `pin_memory` of the loader).
    """

    def __init__(
        self,
        mean: Sequence[float] = (123.675, 116.28, 103.53),
        std: Sequence[float] = (58.395, 57.12, 57.375),
        non_blocking: bool = False,
    ) -> None:
        super().__init__(mean, std, non_blocking=non_blocking)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Return `inputs`, one normalised batch per view, and `geometry`, which stays on the host.

        Args:
            data: Batch from the loader, with `views` when there are several.
            training: Whether the model is trained.

        Shape:
            inputs V times [B, 3, size, size]; returns V times float32 [B, 3, size, size].
        """
        if "views" not in data:
            return super().forward(data, training)
        views = data["views"]
        geometry = ViewGeometry(
            views["boxes"],
            views["flips"],
            tuple((int(view.shape[2]), int(view.shape[3])) for view in data["inputs"]),
        )
        geometry.validate()
        settings = views["photometry"]
        inputs = []
        for number, view in enumerate(data["inputs"]):
            view = view.to(self.device, non_blocking=self._non_blocking)
            if settings.shape[1]:
                view = apply_to_batch(view, settings[:, number])
            inputs.append(self.normalise(view))
        return {"inputs": inputs, "data_samples": None, "geometry": geometry}


def by_size(views: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Group views of one size, wherever they stand in the order, and concatenate each group.

    Args:
        views: One batch per view.

    Shape:
        views V times [B, 3, h, w]; returns groups of view numbers and [S * B, 3, h, w], view by view.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, view in enumerate(views):
        groups.setdefault(tuple(view.shape[2:]), []).append(number)
    return [(numbers, torch.cat([views[n] for n in numbers])) for numbers in groups.values()]
