"""Heads: the classifier whose weights give class activation maps, and one for networks that classify.

Letters: B images, h x w cells, C channels, K classes.
"""

from __future__ import annotations

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from patchreg.models.base import TokenFeatures
from patchreg.registry import HEADS, MODELS


@HEADS.register_module()
class AnchorNetCAMHead(BaseModule):
    """Linear classifier on the mean of the cells; the same weights score each cell for a class.

    Source:
        Section 3.2 of the paper; `fc` of `models/anchornet.py`.

    Args:
        num_classes: Classes K.
        in_channels: Channels C of a cell.
        loss: Config of the loss; cross-entropy by default.
        init_cfg: Weights to load, as in MMEngine.

    Differs from official:
        The number of classes is respected; the official constructor always builds 1000.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 512,
        loss: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.fc = nn.Linear(in_channels, num_classes)
        nn.init.normal_(self.fc.weight, std=0.001)
        nn.init.zeros_(self.fc.bias)
        self.loss_module = MODELS.build(loss or {"type": "CrossEntropyLoss"})

    def forward(self, features: TokenFeatures) -> Tensor:
        """Return the logits.

        Args:
            features: Output of a backbone.

        Shape:
            tokens [B, h * w, C]; returns [B, K].
        """
        return self.fc(features.tokens.mean(dim=1))

    def loss(self, features: TokenFeatures, targets: Tensor) -> dict[str, Tensor]:
        """Return the classification loss.

        Args:
            features: Output of a backbone.
            targets: Soft scores or labels.

        Shape:
            targets [B, K] or [B].
        """
        return {"loss_cls": self.loss_module(self(features), targets)}

    def cam(self, features: TokenFeatures, classes: Tensor | None = None) -> Tensor:
        """Return class activation maps: the mean over channels of feature times class weight.

        C times the mean of a map, plus the bias of its class, is the logit of the class.

        Source:
            Equation 2 of the paper.

        Args:
            features: Output of a backbone.
            classes: One class per image; None maps every class.

        Shape:
            classes [B]; returns [B, h, w], or [B, K, h, w] without `classes`.
        """
        weight, tokens = self.fc.weight, features.tokens
        if classes is None:
            maps = torch.einsum("bnc,kc->bkn", tokens, weight)
            return maps.reshape(*maps.shape[:2], *features.grid) / weight.shape[1]
        maps = torch.einsum("bnc,bc->bn", tokens, weight[classes])
        return maps.reshape(-1, *features.grid) / weight.shape[1]

    def macs(self) -> float:
        """Count the multiply-accumulates of the classifier for one image."""
        return float(self.fc.in_features * self.fc.out_features)


@HEADS.register_module()
class AnchorNetLogitsHead(BaseModule):
    """Head of a network that has its own classifier: takes its logits as they are.

    Args:
        loss: Config of the loss; cross-entropy by default.
        init_cfg: As in MMEngine; there are no weights.
    """

    def __init__(self, loss: dict | None = None, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.loss_module = MODELS.build(loss or {"type": "CrossEntropyLoss"})

    def forward(self, features: TokenFeatures) -> Tensor:
        """Return the logits.

        Args:
            features: Logits as one token.

        Shape:
            tokens [B, 1, K]; returns [B, K].
        """
        return features.tokens[:, 0]

    def loss(self, features: TokenFeatures, targets: Tensor) -> dict[str, Tensor]:
        """Return the classification loss.

        Args:
            features: Logits as one token.
            targets: Soft scores or labels.

        Shape:
            targets [B, K] or [B].
        """
        return {"loss_cls": self.loss_module(self(features), targets)}

    def macs(self) -> float:
        """Return 0: the classifier is counted with the network."""
        return 0.0
