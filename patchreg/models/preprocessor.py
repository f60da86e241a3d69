"""From what the loader gives to what a model takes: stacked, on the device, normalised, mixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor

from patchreg.registry import MODELS, TRANSFORMS
from patchreg.utils.errors import ConfigError, DataError, InputTypeError


@MODELS.register_module()
class ImagePreprocessor(BaseDataPreprocessor):
    """Stack, move and normalise images; in training mix them and set soft targets.

    Images are RGB from reading to the model. Normalising happens on the device, so that 8-bit
    images travel. With `batch_augment` each sample gets `gt_score`, its target distribution, in
    training.

    Args:
        mean: Mean per RGB channel, in [0, 255].
        std: Standard deviation per RGB channel, in the same unit.
        num_classes: K; needed for targets, and checked against the labels.
        batch_augment: Config of a transform `(inputs, labels, num_classes) -> (inputs, targets)`
            such as `BatchMixup`, used in training only.
        non_blocking: Copy to the device without waiting (with `pin_memory` of the loader).
        view: Config of a module that every normalised batch goes through, such as
            `LowResolutionViewPreprocessor`, or None.

    Shape:
        `inputs` of the data: [B, C, H, W] or a list of B images [C, H, W]; returns float32 [B, C,
        H, W].

    Raises:
        ConfigError: The arguments do not fit together.
        DataError: Images of different sizes or with the wrong number of channels, or a label >= K.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float] = (123.675, 116.28, 103.53),
        std: Sequence[float] = (58.395, 57.12, 57.375),
        num_classes: int | None = None,
        batch_augment: dict | None = None,
        non_blocking: bool = False,
        view: dict | None = None,
    ) -> None:
        super().__init__(non_blocking)
        if len(mean) != len(std) or min(std) <= 0:
            raise ConfigError(
                f"mean={tuple(mean)}, std={tuple(std)}: expected one positive std per channel mean"
            )
        if batch_augment is not None and num_classes is None:
            raise ConfigError(
                "ImagePreprocessor: batch_augment makes targets and needs num_classes"
            )
        dtype = torch.get_default_dtype()  # integers would make integer buffers
        for name, values in (("mean", mean), ("std", std)):
            constant = torch.tensor(values, dtype=dtype).view(-1, 1, 1)
            self.register_buffer(name, constant, persistent=False)
        self.num_classes = num_classes
        self.view = None if view is None else MODELS.build(view)
        self.batch_augment = None if batch_augment is None else TRANSFORMS.build(batch_augment)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Return `inputs` and `data_samples` as a model takes them.

        Args:
            data: Batch from the loader with `inputs` and, except for plain prediction,
                `data_samples`.
            training: Whether to mix.
        """
        inputs = self.normalise(data["inputs"])
        samples = data.get("data_samples")
        if samples is None:
            return {"inputs": inputs, "data_samples": None}
        labels = self._move(samples)
        if training and self.batch_augment is not None:
            if labels is None:
                raise DataError(
                    "training with batch_augment needs one gt_label per sample; end the pipeline "
                    "with mmpretrain.PackInputs on a data set with labels, or set "
                    "batch_augment=None"
                )
            inputs, targets = self.batch_augment(inputs, labels, self.num_classes)
            for sample, target in zip(samples, targets, strict=True):
                sample.set_gt_score(target)
        return {"inputs": inputs, "data_samples": samples}

    def normalise(self, inputs: Tensor | Sequence[Tensor]) -> Tensor:
        """Stack images, move them to the device, normalise them and take the view.

        Args:
            inputs: Batch, or images of one size.

        Shape:
            inputs [B, C, H, W] or B times [C, H, W]; returns float32 [B, C, H, W].
        """
        if not isinstance(inputs, Tensor):
            shapes = {tuple(image.shape) for image in inputs}
            if len(shapes) != 1:
                raise DataError(
                    f"images of one batch have different shapes, such as {sorted(shapes)[:3]}; "
                    "end the pipeline with a crop or resize to one size, such as "
                    "mmpretrain.CenterCrop, before PackInputs"
                )
            inputs = torch.stack(list(inputs))
        if inputs.ndim != 4:
            raise InputTypeError(
                f"inputs have shape {tuple(inputs.shape)}; expected [B, C, H, W] or a list of [C, "
                "H, W]"
            )
        if inputs.shape[1] != len(self.mean):
            raise DataError(
                f"images have {inputs.shape[1]} channels, mean and std have {len(self.mean)}; "
                "LoadImage gives 3 (RGB)"
            )
        inputs = inputs.to(self.device, non_blocking=self._non_blocking)
        inputs = inputs.to(self.mean.dtype).sub(self.mean).div_(self.std)
        return inputs if self.view is None else self.view(inputs)

    def _move(self, samples: Sequence[Any]) -> Tensor | None:
        """Move the samples' tensors to the device and return the labels [B], if all have one.

        One copy serves all labels; a copy per sample would cost milliseconds per batch on a GPU.
        """
        labels = None
        if all("gt_label" in sample and sample.gt_label.numel() == 1 for sample in samples):
            labels = torch.cat([sample.gt_label for sample in samples])
            low, high = (int(bound) for bound in labels.aminmax())
            if self.num_classes is not None and not 0 <= low <= high < self.num_classes:
                raise DataError(
                    f"label {low if low < 0 else high} does not fit num_classes={self.num_classes} "
                    f"(labels 0 to {self.num_classes - 1}); set num_classes of the preprocessor "
                    "and the head to the data's"
                )
            labels = labels.to(self.device, non_blocking=self._non_blocking)
        if self.device.type != "cpu":
            for position, sample in enumerate(samples):
                for key, value in sample.items():
                    if key == "gt_label" and labels is not None:
                        sample.gt_label = labels[position : position + 1]
                    elif isinstance(value, Tensor):
                        setattr(sample, key, value.to(self.device, non_blocking=self._non_blocking))
        return labels
