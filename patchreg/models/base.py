"""What every image classifier does the same way: modes, targets, predictions, selection.

Letters: B images, N tokens, E extra tokens in front of the grid, H x W token grid, C channels, K
classes.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from mmengine.model import BaseModel
from torch import Tensor

from patchreg.registry import MODELS
from patchreg.structures import PatchSelection
from patchreg.utils.errors import ConfigError, DataError


@dataclass(eq=False)
class TokenFeatures:
    """What a token backbone returns.

    Args:
        tokens: Tokens after the final norm, extra tokens first, then the grid in raster order.
        grid: Rows and columns of the token grid.
        extra: Number of extra tokens E.
        blocks: Outputs of the blocks that were asked for, before the final norm, in execution
            order.
        maps: Feature maps of a pyramid, finest first; empty for a plain backbone.
        macs: Multiply-accumulates of the backbone for each image, or None when nothing is adaptive.
        dense_macs: Multiply-accumulates of the dense twin of the backbone, for one image.
        routing: What a method wants to remember of this forward pass (not kept by any module).

    Shape:
        tokens [B, E + H * W, C]; blocks [B, E + H * W, C] each; maps [B, C_i, H_i, W_i]; macs [B]
        float64.
    """

    tokens: Tensor
    grid: tuple[int, int]
    extra: int
    blocks: tuple[Tensor, ...] = ()
    maps: tuple[Tensor, ...] = ()
    macs: Tensor | None = None
    dense_macs: float = 0.0
    routing: Any = None


def map_features(feature_map: Tensor, dense_macs: float) -> TokenFeatures:
    """Give a feature map the form that heads and classifiers read; no extra tokens.

    Args:
        feature_map: Last map of a convolutional network.
        dense_macs: Multiply-accumulates of the network for one image.

    Shape:
        feature_map [B, C, h, w]; tokens [B, h * w, C].
    """
    return TokenFeatures(
        tokens=feature_map.flatten(2).transpose(1, 2),
        grid=(feature_map.shape[2], feature_map.shape[3]),
        extra=0,
        maps=(feature_map,),
        dense_macs=dense_macs,
    )


def stack_targets(data_samples: list[Any], device: torch.device) -> Tensor:
    """Stack the training targets of a batch: mixed scores when there are any, else labels.

    Args:
        data_samples: Samples with `gt_score` (set by batch mixing) or `gt_label`.
        device: Device of the result.

    Shape:
        Returns [B, K] scores or [B] int64 labels.

    Raises:
        DataError: A sample has neither.
    """
    for field in ("gt_score", "gt_label"):
        if all(field in sample for sample in data_samples):
            targets = torch.stack([sample.get(field) for sample in data_samples])
            targets = targets if field == "gt_score" else targets.reshape(len(data_samples))
            return targets.to(device, non_blocking=True)
    missing = next(sample for sample in data_samples if "gt_label" not in sample)
    name = missing.get("img_path", "without a path")
    raise DataError(
        f"the image {name} has no label (gt_label); use a labelled data set for this model"
    )


def fill_predictions(
    data_samples: list[Any] | None, logits: Tensor, macs: Tensor, dense_macs: float
) -> list[Any]:
    """Write predictions and cost into the samples of a batch.

    Args:
        data_samples: Samples to fill; their class needs `set_pred_score`, `set_pred_label`, `set_field`.
        logits: One row per sample; probabilities are computed at least in float32.
        macs: Multiply-accumulates per image.
        dense_macs: Those of the dense twin.

    Shape:
        logits [B, K]; macs [B].

    Raises:
        DataError: There are no samples to fill.
    """
    if data_samples is None:
        raise DataError(
            "predict needs one data sample per image to fill; use mode='tensor' for logits"
        )
    logits = logits.float() if logits.element_size() < 4 else logits
    scores = logits.softmax(dim=1).cpu()
    labels = logits.argmax(dim=1, keepdim=True).cpu()  # Scores may round to equal ones.
    costs = macs.tolist()
    for index, sample in enumerate(data_samples):
        sample.set_pred_score(scores[index])
        sample.set_pred_label(labels[index])
        sample.set_field(costs[index], "macs", dtype=None, field_type="data")
        sample.set_field(dense_macs, "dense_macs", dtype=None, field_type="data")
    return data_samples


class ImageModel(BaseModel):
    """A model of single images with the three modes of MMEngine, each a method of its own."""

    def forward(
        self, inputs: Tensor, data_samples: list[Any] | None = None, mode: str = "tensor"
    ) -> Any:
        """Run the model in one of MMEngine's modes.

        Args:
            inputs: Preprocessed images.
            data_samples: One sample per image; needed by `loss` and filled by `predict`.
            mode: `tensor` returns the logits, `loss` a dict of losses, `predict` the samples.

        Shape:
            inputs [B, 3, H, W]; logits [B, K].

        Raises:
            DataError: A batch is too small for BatchNorm.
            ValueError: The mode is unknown.
        """
        if mode == "tensor":
            return self.logits(inputs)
        if mode == "loss":
            try:
                return self.loss(inputs, data_samples or [])
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise DataError(
                    f"a training batch of {len(inputs)} image(s) leaves a BatchNorm one value per "
                    "channel; set drop_last=True, larger batches or larger images"
                ) from error
        if mode == "predict":
            return self.predict(inputs, data_samples)
        raise ValueError(f"mode={mode!r} is unknown; expected 'tensor', 'loss' or 'predict'")

    def logits(self, inputs: Tensor) -> Tensor:
        """Classify images.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; returns [B, K].
        """
        raise NotImplementedError

    def loss(self, inputs: Tensor, data_samples: list[Any]) -> dict[str, Tensor]:
        """Return the losses of a training batch.

        Args:
            inputs: Preprocessed images.
            data_samples: Samples with targets.

        Shape:
            inputs [B, 3, H, W].
        """
        raise NotImplementedError

    def predict(self, inputs: Tensor, data_samples: list[Any] | None = None) -> list[Any]:
        """Fill in predictions and cost of a batch.

        Args:
            inputs: Preprocessed images.
            data_samples: Samples to fill.

        Shape:
            inputs [B, 3, H, W].
        """
        raise NotImplementedError

    def classify_all(self, inputs: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return logits of whole images, the cost of each image, and that of the dense twin.

        Models whose logits and cost come from one pass say so by overriding this.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; returns [B, K], float64 [B] and a number.
        """
        chosen = cast(Any, self).select(inputs)
        return self.logits(inputs), chosen.macs, chosen.dense_macs


@MODELS.register_module()
class PatchClassifier(ImageModel):
    """Image classifier of a token backbone and a head, with the modes of an MMEngine model.

    Args:
        backbone: Config of the backbone; it returns `TokenFeatures`.
        head: Config of the head.
        data_preprocessor: Config of the preprocessor, or None.
        init_cfg: Weights to load, as in MMEngine.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.backbone = MODELS.build(backbone)
        self.head = MODELS.build(head)

    def logits(self, inputs: Tensor) -> Tensor:
        """Classify images.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; returns [B, K].
        """
        return self.head(self.extract(inputs))

    def extract(self, inputs: Tensor) -> TokenFeatures:
        """Run the backbone.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        return self.backbone(inputs)

    def classify_all(self, inputs: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return logits of whole images, the cost of each image, and that of the dense twin.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; returns [B, K], float64 [B] and a number.
        """
        features = self.extract(inputs)
        return self.head(features), *self.cost(features)

    def classify_kept(self, inputs: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return logits from some patches only, the cost of each image, and that of a whole one.

        Args:
            inputs: Preprocessed images.
            cells: Patches that take part; the others are never computed.

        Shape:
            inputs [B, 3, H, W]; cells [B, kept] int64; returns [B, K], float64 [B] and a number.

        Raises:
            ConfigError: The backbone needs all patches.
        """
        if "cells" not in inspect.signature(self.backbone.forward).parameters:
            raise ConfigError(
                f"{type(self.backbone).__name__} needs all patches; use a VisionTransformerBackbone, or a "
                "ViT of timm in a TimmPatchClassifier"
            )
        features = self.backbone(inputs, cells=cells)
        return self.head(features), *self.cost(features)

    def loss(self, inputs: Tensor, data_samples: list[Any]) -> dict[str, Tensor]:
        """Return the losses of a training batch.

        Args:
            inputs: Preprocessed images.
            data_samples: Samples with targets.

        Shape:
            inputs [B, 3, H, W].
        """
        return self.head.loss(self.extract(inputs), stack_targets(data_samples, inputs.device))

    def predict(self, inputs: Tensor, data_samples: list[Any] | None = None) -> list[Any]:
        """Fill in predictions and cost of a batch.

        Args:
            inputs: Preprocessed images.
            data_samples: Samples to fill; their class needs `set_pred_score`, `set_pred_label`,
                `set_field`.

        Shape:
            inputs [B, 3, H, W].

        Raises:
            DataError: There are no samples to fill.
        """
        features = self.extract(inputs)
        samples = fill_predictions(data_samples, self.head(features), *self.cost(features))
        self.fill(samples, features)
        return samples

    def fill(self, data_samples: list[Any], features: TokenFeatures) -> None:
        """Write what a method wants to tell about each image into the samples; nothing here.

        Args:
            data_samples: Samples of `predict`.
            features: What `extract` returned.
        """

    def cost(self, features: TokenFeatures) -> tuple[Tensor, float]:
        """Return the cost of the whole model: executed per image, and of the dense twin.

        Args:
            features: What `extract` returned.

        Shape:
            Returns [B] float64 and a number.
        """
        head = self.head.macs()
        dense = features.dense_macs + head
        if features.macs is None:
            batch = features.tokens.shape[0]
            return features.tokens.new_full((batch,), dense, dtype=torch.float64), dense
        return features.macs + head, dense

    @torch.no_grad()
    def select(self, inputs: Tensor) -> PatchSelection:
        """Say which patches are looked at; a plain classifier looks at all of them, fully.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        features = self.extract(inputs)
        macs, dense_macs = self.cost(features)
        return PatchSelection.of_all(
            image_size=(inputs.shape[2], inputs.shape[3]),
            grid=features.grid,
            macs=macs,
            dense_macs=dense_macs,
        )
