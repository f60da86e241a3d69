"""Classification losses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.registry import MODELS
from patchreg.utils.errors import ConfigError


@MODELS.register_module()
class CrossEntropyLoss(nn.Module):
    """Cross-entropy against soft scores, smoothed labels or plain labels, as the batch brings.

    Soft scores are used as they are: mixing has smoothed them already.

    Source:
        Criterion choice of DeiT: soft-target cross-entropy with mixup, else label smoothing, else
            plain.

    Args:
        label_smooth: Mass spread evenly over all classes when targets are labels, in [0, 1).
        loss_weight: Factor of the result.

    Raises:
        ConfigError: `label_smooth` is outside [0, 1).
    """

    def __init__(self, label_smooth: float = 0.0, loss_weight: float = 1.0) -> None:
        super().__init__()
        if not 0.0 <= label_smooth < 1.0:
            raise ConfigError(f"label_smooth={label_smooth} is outside [0, 1); 0.1 is usual")
        self.label_smooth = label_smooth
        self.loss_weight = loss_weight

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over the batch; half-precision logits are lifted to float32.

        Args:
            logits: Unnormalised scores.
            targets: Soft scores (rows sum to 1) or int64 labels.

        Shape:
            logits [B, K]; targets [B, K] or [B]; returns a scalar.
        """
        if logits.element_size() < 4:
            logits = logits.float()
        if targets.is_floating_point():
            loss = F.cross_entropy(logits, targets.to(logits.dtype))
        else:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smooth)
        return self.loss_weight * loss
