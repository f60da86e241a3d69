"""Projection head of self-distillation: an MLP, a unit-length bottleneck and weight-normalised prototypes.

Letters: D channels in, C bottleneck channels, K prototypes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from patchreg.models.layers import init_transformer
from patchreg.registry import MODELS
from patchreg.utils.errors import ConfigError, DataError


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are directions `v / |v|` times gains `g`.

    Parameters are called `weight_g` and `weight_v`, as those of `torch.nn.utils.weight_norm`.

    Args:
        in_features: Channels in.
        out_features: Rows K.
        train_gain: Whether the gains, 1 at the start, are trained.
    """

    def __init__(self, in_features: int, out_features: int, train_gain: bool = True) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1), requires_grad=train_gain)
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def weight(self) -> Tensor:
        """Return the matrix that is applied.

        Shape:
            Returns [K, C].
        """
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the matrix to the last dimension.

        Args:
            x: Features.

        Shape:
            x [..., C]; returns [..., K].
        """
        return F.linear(x, self.weight())


@MODELS.register_module()
class ProjectionHead(BaseModule):
    """DINO's head: MLP with GELU, L2-normalised bottleneck, weight-normalised linear layer.

    Tokens are projected one by one. Parameter names are the official ones: `mlp.{0,2,4}` (with batch
    norm `mlp.{0,1,3,4,6}`, with one layer `mlp`), `last_layer.weight_g`, `last_layer.weight_v`.

    Source:
        "Emerging Properties in Self-Supervised Vision Transformers" (DINO), `DINOHead`.

    Args:
        in_channels: D.
        out_dim: Prototypes K.
        norm_last_layer: Keep the gains of the last layer at 1.
        num_layers: Linear layers of the MLP, at least 1; one layer goes straight to the bottleneck.
        hidden_dim: Channels between them.
        bottleneck_dim: C.
        use_bn: BatchNorm1d after every hidden layer, before the GELU; for vectors only.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: A size is smaller than 1.

    Differs from official:
        Batch norm on tokens, which fails inside BatchNorm1d there, is refused with a reason.
    """

    def __init__(
        self,
        in_channels: int,
        out_dim: int,
        norm_last_layer: bool = True,
        num_layers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        use_bn: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        sizes = dict(
            in_channels=in_channels,
            out_dim=out_dim,
            num_layers=num_layers,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
        )
        wrong = {name: size for name, size in sizes.items() if size < 1}
        if wrong:
            raise ConfigError(f"ProjectionHead: {wrong}: expected at least 1")
        self.out_dim = out_dim
        self.use_bn = use_bn
        layers: list[nn.Module] = []
        width = in_channels
        for _ in range(num_layers - 1):
            layers.append(nn.Linear(width, hidden_dim))
            if use_bn:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
            width = hidden_dim
        layers.append(nn.Linear(width, bottleneck_dim))
        self.mlp = nn.Sequential(*layers) if num_layers > 1 else layers[0]
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, not norm_last_layer)
        init_transformer(self.mlp)

    def bottleneck(self, x: Tensor) -> Tensor:
        """Return the unit-length features before the last layer.

        Args:
            x: Vectors or tokens.

        Shape:
            x [..., D]; returns [..., C].

        Raises:
            DataError: Tokens where the head has batch norm.
        """
        if self.use_bn and x.ndim != 2:
            raise DataError(
                f"ProjectionHead(use_bn=True) got tokens of shape {tuple(x.shape)}; batch norm works on "
                "vectors [B, D] only: set use_bn=False"
            )
        return F.normalize(self.mlp(x), dim=-1, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """Project vectors or tokens.

        Args:
            x: Vectors or tokens.

        Shape:
            x [..., D]; returns [..., K].
        """
        return self.last_layer(self.bottleneck(x))

    def macs(self) -> int:
        """Count the multiply-accumulates for one vector or token."""
        linear = [part for part in self.mlp.modules() if isinstance(part, nn.Linear)]
        return sum(part.weight.numel() for part in linear) + self.last_layer.weight_v.numel()
