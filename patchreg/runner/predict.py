"""Classify images with any trained model of a config: classes, boxes, cost."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.dataset import default_collate

from patchreg.runner.build import load_config, resolve_checkpoint
from patchreg.runner.compare import load_model
from patchreg.runner.picture import model_classes, read_samples
from patchreg.structures import PatchSelection
from patchreg.utils.errors import ConfigError


@dataclass(eq=False)
class Prediction:
    """What a model says about one image.

    Args:
        image: The image as the model got it, uint8 RGB.
        selection: Where the model looked.
        record: Everything as plain values, for JSON. Boxes are (x0, y0, x1, y1), half-open, in px of
            `image`, in the order looked at.

    Shape:
        image [H, W, 3].
    """

    image: np.ndarray
    selection: PatchSelection
    record: dict[str, Any]


def predict(
    source: str,
    path: str,
    checkpoint: str,
    *,
    budget: float | None = None,
    top: int = 5,
    count: int = 8,
) -> list[Prediction]:
    """Classify images one by one, so that a model that stops early does.

    Args:
        source: Image file, folder of images, or `test` for the config's test set.
        path: Config file.
        checkpoint: Checkpoint, or folder of a run for its newest one.
        budget: Mean cost of an image that the model may take, in its own unit (multiply-accumulates), for
            models that have such a knob.
        top: How many classes to name.
        count: How many images at most.

    Raises:
        UserError: An input is missing or cannot be used.
    """
    for name, value in (("top", top), ("count", count)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: expected at least 1")
    checkpoint = resolve_checkpoint(checkpoint)
    # The named checkpoint takes the place of the one that the config would load.
    config = load_config(path, {"load_from": checkpoint})
    if config.get("test_dataloader") is None or "model" not in config:
        raise ConfigError(
            f"'{path}' has no model with a test_dataloader, whose pipeline reads the images; use the "
            "config of one stage"
        )
    model = load_model(config, checkpoint)
    if budget is not None:
        if not hasattr(model, "set_budget"):
            raise ConfigError(
                f"--budget: {type(model).__name__} has no budget that can be set for single images"
            )
        model.set_budget(budget, checkpoint)
    classes = model_classes(config)
    found = []
    for sample in read_samples(source, config, count):
        found.append(_one(model, sample, classes, top))
    return found


@torch.inference_mode()
def _one(model: Any, sample: dict[str, Any], classes: list[str], top: int) -> Prediction:
    batch = default_collate([sample])
    image = batch["inputs"][0].permute(1, 2, 0).numpy().astype(np.uint8)
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    start = time.perf_counter()
    answer = model.predict(data["inputs"], data["data_samples"])[0]
    seconds = time.perf_counter() - start
    if "pred_score" not in answer:
        raise ConfigError(
            f"{type(model).__name__} gives features, not classes; use the config of a classifier"
        )
    selection = model.select(data["inputs"]).to("cpu")
    scores = answer.pred_score.cpu()
    if not classes and len(scores) == 1000:
        classes = _imagenet_names()
    best = scores.topk(min(top, len(scores)))
    looked = selection.order[0] >= 0
    record: dict[str, Any] = dict(
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
        milliseconds=1000 * seconds,
    )
    if "stage" in answer:
        record["stage"] = answer.stage
        record["stages"] = model.stages
    return Prediction(image, selection, record)


def _imagenet_names() -> list[str]:
    """Return ImageNet-1k's names, for a model of 1000 classes whose data set is not here."""
    try:
        from mmpretrain.datasets.categories import IMAGENET_CATEGORIES
    except ImportError:
        return []
    return list(IMAGENET_CATEGORIES)
