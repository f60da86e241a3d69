"""What a model says about images, as plain values: classes, boxes, cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.dataset import default_collate
from torch import Tensor

from patchreg.structures import PatchSelection
from patchreg.utils.errors import ConfigError


@dataclass(eq=False)
class Prediction:
    """What a model says about one image.

    Args:
        image: The image as the model got it, uint8 RGB.
        score: Probability of every class.
        selection: Where the model looked; one image.
        record: Everything as plain values, for JSON. Boxes are (x0, y0, x1, y1), half-open, in px of
            `image`, in the order looked at; `milliseconds` is the time of the batch over its images.

    Shape:
        image [H, W, 3]; score [K] float32.
    """

    image: np.ndarray
    score: Tensor
    selection: PatchSelection
    record: dict[str, Any]

    @property
    def label(self) -> int:
        """Most probable class."""
        return self.record["classes"][0]["label"]

    @property
    def name(self) -> str:
        """Its name, or its number where nothing tells names."""
        return self.record["classes"][0]["name"]

    @property
    def confidence(self) -> float:
        """Its probability, in [0, 1]."""
        return self.record["classes"][0]["confidence"]


@torch.no_grad()
def predict_batch(
    network: Any, samples: Sequence[dict[str, Any]], classes: Sequence[str] = (), top: int = 5
) -> list[Prediction]:
    """Classify images of one size together.

    Args:
        network: Model in evaluation mode with `predict` and `select`.
        samples: What a test pipeline gives.
        classes: Names of the classes by label; those of ImageNet-1k are known for 1000 classes.
        top: How many classes to name.

    Raises:
        ConfigError: The model does not classify.
    """
    batch = default_collate(list(samples))
    images = batch["inputs"].permute(0, 2, 3, 1).numpy().astype(np.uint8)
    data = network.data_preprocessor(batch, False)
    start = time.perf_counter()
    answers = _answers(network, data)
    seconds = time.perf_counter() - start
    selection = network.select(data["inputs"]).to("cpu")
    found = []
    for index, answer in enumerate(answers):
        score = answer.pred_score.float().cpu()
        one = selection[index]
        record = _record(answer, score, one, classes or _imagenet_names(len(score)), top)
        record["milliseconds"] = 1000 * seconds / len(answers)
        if "stage" in answer:
            record |= dict(stage=answer.stage, stages=network.stages)
        found.append(Prediction(images[index], score, one, record))
    return found


def _answers(network: Any, data: dict[str, Any]) -> list[Any]:
    kind = type(network).__name__
    if hasattr(network, "predict"):
        answers = network.predict(data["inputs"], data["data_samples"])
        if "pred_score" in answers[0]:
            return answers
    raise ConfigError(f"{kind} gives features, not classes; use the config of a classifier")


def _record(
    answer: Any, score: Tensor, selection: PatchSelection, classes: Sequence[str], top: int
) -> dict[str, Any]:
    best = score.topk(min(top, len(score)))
    looked = selection.order[0] >= 0
    return dict(
        image=str(answer.get("img_path", "")),
        image_size=list(selection.image_size),
        classes=[
            dict(
                label=label,
                name=classes[label] if label < len(classes) else str(label),
                confidence=confidence,
            )
            for label, confidence in zip(best.indices.tolist(), best.values.tolist())
        ],
        boxes=selection.boxes[0][looked].tolist(),
        scores=[selection.score[0, cell].item() for cell in selection.order[0][looked]],
        macs=answer.macs,
        dense_macs=answer.dense_macs,
    )


def _imagenet_names(count: int) -> Sequence[str]:
    """Return ImageNet-1k's names, for a model of 1000 classes whose data set is not here."""
    if count != 1000:
        return ()
    try:
        from mmpretrain.datasets.categories import IMAGENET_CATEGORIES
    except ImportError:
        return ()
    return IMAGENET_CATEGORIES
