"""Models and weights that the AnchorNet tests share."""

from __future__ import annotations

import zlib
from typing import Any

import golden_reader
import numpy as np
import pytest
import torch
from golden_reader import GoldenFile
from torch import Tensor

from patchreg.methods.anchornet.convert import anchor_from_official, anchor_to_official
from patchreg.methods.anchornet.model import AnchorNetClassifier, AnchorNetViewClassifier
from patchreg.registry import MODELS

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def golden(name: str, needs: str | None = None) -> GoldenFile:
    """A golden file; a test that needs what only the full set has is skipped."""
    folder = golden_reader.folder("anchornet")
    if (folder / f"{name}.safetensors").is_file():
        file = golden_reader.load("anchornet", name)
        if needs is None or needs in file:
            return file
    pytest.skip(
        f"{needs or name} is not in the compact set ({folder.name}/{name}): set PATCHREG_GOLDEN to the "
        "folder of the full set"
    )


def normalised(images: Tensor) -> Tensor:
    """Images as the networks get them."""
    return (images.float() / 255 - MEAN) / STD


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Largest difference relative to the largest value."""
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


def localiser(classes: int = 1000, **kwargs: Any) -> AnchorNetClassifier:
    """The published localiser."""
    config = dict(
        type="AnchorNetClassifier",
        backbone=dict(type="AnchorNetBackbone"),
        head=dict(type="AnchorNetCAMHead", num_classes=classes),
    )
    return MODELS.build({**config, **kwargs})


def official_shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of a localiser's weights by official name."""
    return {key: tuple(value.shape) for key, value in anchor_to_official(state).items()}


def recipe(shapes: dict[str, tuple[int, ...]], seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Closed-form weights of the golden files."""
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(100)
            continue
        generator = np.random.RandomState(zlib.crc32(f"{seed}/{key}".encode()))
        z = generator.standard_normal(shape)
        if key.endswith("running_mean"):
            z = 0.1 * z
        elif key.endswith("running_var"):
            z = np.exp(0.2 * z)
        elif len(shape) >= 2:
            z = z * np.sqrt(2 / np.prod(shape[1:]))
        elif key.endswith("weight"):
            z = 1 + 0.1 * z
        else:
            z = 0.05 * z
        state[key] = torch.from_numpy(np.asarray(z)).float()
    for key in state:
        if key.rsplit(".", 1)[0] in ("fc", "classifier"):
            state[key] *= scale
    return state


def recipe_localiser(seed: int, **kwargs: Any) -> AnchorNetClassifier:
    """The published localiser with closed-form weights, in evaluation mode."""
    model = localiser(**kwargs)
    weights = recipe(official_shapes(model.state_dict()), seed)
    model.load_state_dict(anchor_from_official(weights))
    return model.eval()


def recipe_network(name: str, seed: int, scale: float) -> AnchorNetViewClassifier:
    """A downstream network of torchvision with closed-form weights, in evaluation mode."""
    backbone = dict(type="TorchvisionBackbone", model_name=name, num_classes=1000)
    model = MODELS.build(dict(type="AnchorNetViewClassifier", backbone=backbone))
    net = model.backbone.model
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    net.load_state_dict(recipe(shapes, seed, scale))
    return model.eval()


def inclusive(boxes: Tensor) -> Tensor:
    """Boxes (x0, y0, x1, y1), half-open, in the golden files' form (row0, col0, row1, col1)."""
    swapped = boxes[..., [1, 0, 3, 2]]
    swapped = swapped - torch.tensor([0, 0, 1, 1])
    return torch.where(boxes[..., :1] < 0, -1, swapped).int()
