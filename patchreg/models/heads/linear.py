"""Linear classification head on tokens."""

from __future__ import annotations

from collections import OrderedDict

from mmengine.model import BaseModule
from torch import Tensor, nn

from patchreg.models.base import TokenFeatures
from patchreg.models.layers import init_transformer
from patchreg.registry import MODELS
from patchreg.utils.errors import ConfigError


@MODELS.register_module()
class LinearHead(BaseModule):
    """Linear classifier on the class token or on the mean of the tokens, with DeiT's options.

    Parameter names are those of the official DeiT (`head`, `head_dist`, `pre_logits.fc`).

    Source:
        DeiT's `VisionTransformer` and `DistilledVisionTransformer`.

    Args:
        num_classes: Classes K.
        in_channels: Channels of a token.
        pool: `cls` reads the first token, `mean` averages all tokens.
        distilled: Read the second token with a second classifier; training returns both logits,
            evaluation their mean.
        representation_size: Width of a Linear + tanh in front of the classifier, or None.
        loss: Config of the loss on the (class token's) logits.
        init: Start of the weights: `transformer` (DeiT's), or `torch` (PyTorch's default, usual
            behind convolutional networks).
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: Unknown `pool` or `init`, or `distilled` together with `pool='mean'` or
            `representation_size`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        pool: str = "cls",
        distilled: bool = False,
        representation_size: int | None = None,
        loss: dict | None = None,
        init: str = "transformer",
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if pool not in ("cls", "mean"):
            raise ConfigError(
                f"pool={pool!r} is unknown; use 'cls' (class token) or 'mean' (all tokens)"
            )
        if init not in ("transformer", "torch"):
            raise ConfigError(f"init={init!r} is unknown; use 'transformer' or 'torch'")
        if distilled and (pool != "cls" or representation_size):
            raise ConfigError(
                "distilled=True reads the class and the distillation token: use pool='cls' and no "
                f"representation_size (got {pool!r} and {representation_size})"
            )
        self.num_classes = num_classes
        self.pool = pool
        self.distilled = distilled
        self.pre_logits: nn.Module = nn.Identity()
        if representation_size:
            layers = [("fc", nn.Linear(in_channels, representation_size)), ("act", nn.Tanh())]
            self.pre_logits = nn.Sequential(OrderedDict(layers))
        width = representation_size or in_channels
        self.head = nn.Linear(width, num_classes)
        if distilled:
            self.head_dist = nn.Linear(width, num_classes)
        self.loss_module = MODELS.build(loss or {"type": "CrossEntropyLoss"})
        if init == "transformer":
            init_transformer(self)

    def forward(self, features: TokenFeatures) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits; a distilled head returns a pair while training.

        Args:
            features: Output of a token backbone.

        Shape:
            tokens [B, N, C]; logits [B, K].

        Raises:
            ConfigError: The backbone has no class token, or no distillation token, to read.
        """
        if self.pool == "mean":
            return self.head(self.pre_logits(features.tokens.mean(dim=1)))
        needed = 1 + self.distilled
        if features.extra < needed:
            raise ConfigError(
                f"the head reads {needed} extra token(s) but the backbone has {features.extra}; "
                "set cls_token/dist_token of the backbone, or pool='mean'"
            )
        logits = self.head(self.pre_logits(features.tokens[:, 0]))
        if not self.distilled:
            return logits
        logits_dist = self.head_dist(features.tokens[:, 1])
        return (logits, logits_dist) if self.training else (logits + logits_dist) / 2

    def loss(self, features: TokenFeatures, targets: Tensor) -> dict[str, Tensor]:
        """Return the classification loss; a distilled head uses its class token's logits.

        Args:
            features: Output of a token backbone.
            targets: Soft scores or labels.

        Shape:
            targets [B, K] or [B].
        """
        logits = self(features)
        return {
            "loss_cls": self.loss_module(
                logits[0] if isinstance(logits, tuple) else logits, targets
            )
        }

    def macs(self) -> float:
        """Count the multiply-accumulates of the classifiers for one image."""
        layers = [part for part in self.modules() if isinstance(part, nn.Linear)]
        return float(sum(layer.in_features * layer.out_features for layer in layers))
