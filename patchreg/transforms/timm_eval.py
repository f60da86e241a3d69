"""The evaluation crop that a model of timm was published with."""

from __future__ import annotations

from typing import Any

import numpy as np

from patchreg.registry import TRANSFORMS
from patchreg.utils.errors import ConfigError


def timm_data_config(model_name: str) -> dict[str, Any]:
    """Return size, crop, interpolation, mean and deviation that timm publishes for a model.

    Args:
        model_name: Name of the model, with or without a tag, such as `vit_base_patch32_384`.

    Raises:
        ConfigError: timm is not installed or does not know the model.
    """
    try:
        from timm.data import resolve_data_config
        from timm.models import get_pretrained_cfg, is_model
    except ImportError as error:
        raise ConfigError(f"'{model_name}' needs timm: pip install timm") from error
    if not is_model(model_name):
        raise ConfigError(f"timm has no model '{model_name}'; see timm.list_models()")
    published = get_pretrained_cfg(model_name)
    return resolve_data_config({}, pretrained_cfg=published.to_dict() if published else {})


@TRANSFORMS.register_module()
class TimmEvalCrop:
    """Resize and crop an image as the evaluation of a model of timm does.

    Source:
        `timm.data.create_transform`.

    Args:
        model_name: Name of the model.

    Raises:
        ConfigError: timm is not installed or does not know the model.
    """

    def __init__(self, model_name: str) -> None:
        config = timm_data_config(model_name)
        from timm.data import create_transform

        names = ("input_size", "interpolation", "crop_pct", "crop_mode")
        steps = create_transform(**{name: config[name] for name in names}).transforms
        # The last two make a normalised tensor, which the preprocessor does here.
        self.steps = steps[:-2]
        self.model_name = model_name

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Return the sample with `img` resized and cropped.

        Args:
            results: Sample with `img`, [H, W, 3] uint8 RGB.
        """
        from PIL import Image

        image = Image.fromarray(results["img"])
        for step in self.steps:
            image = step(image)
        results["img"] = np.array(image)
        results["img_shape"] = results["img"].shape[:2]
        return results

    def __repr__(self) -> str:
        return f"TimmEvalCrop(model_name={self.model_name!r})"
