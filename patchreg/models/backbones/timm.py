"""Any model of the timm library, with local weights."""

from __future__ import annotations

import torch
from mmengine.model import BaseModule
from torch import Tensor

from patchreg.registry import MODELS
from patchreg.utils.errors import CheckpointError, ConfigError
from patchreg.utils.weights import load_weights


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """Model of timm by name; nothing is downloaded.

    Its output is the timm model's own: logits with `num_classes`, features without. timm is
    imported when the model is built, not before.

    Args:
        model_name: Name known to `timm.create_model`, such as `regnety_160`.
        num_classes: Classes, or 0 for features.
        checkpoint: Local weight file, or None for random weights.
        frozen: Never train it: evaluation mode, no gradient.
        model_kwargs: Further arguments of the timm model.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: timm is not installed or does not know the model.
        CheckpointError: The weights do not fit the model.
        MissingFileError: The weight file does not exist.
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int = 0,
        checkpoint: str | None = None,
        frozen: bool = False,
        model_kwargs: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        try:
            import timm
        except ImportError as error:
            raise ConfigError(
                f"'{model_name}' needs timm, which is not installed: pip install timm"
            ) from error
        if not timm.is_model(model_name):
            near = timm.list_models(f"*{model_name.split('_')[0]}*")[:5]
            raise ConfigError(
                f"timm {timm.__version__} has no model '{model_name}'; similar names: {near}"
            )
        self.frozen = frozen
        self.model = timm.create_model(
            model_name, pretrained=False, num_classes=num_classes, **(model_kwargs or {})
        )
        if checkpoint is not None:
            try:
                self.model.load_state_dict(load_weights(checkpoint))
            except RuntimeError as error:
                raise CheckpointError(
                    f"'{checkpoint}' does not fit '{model_name}': {error}"
                ) from error
        if frozen:
            self.requires_grad_(False)
            self.eval()

    def train(self, mode: bool = True) -> TimmBackbone:
        """Switch the mode, unless frozen.

        Args:
            mode: True for training.
        """
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> Tensor:
        """Run the timm model.

        Args:
            images: Preprocessed images.

        Shape:
            images [B, 3, H, W]; returns [B, K] logits or what the timm model gives as features.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.model(images)
