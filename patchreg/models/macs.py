"""Counting multiply-accumulates of convolutional networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import _disable_current_modes


class CountedMacs:
    """Part of a convolutional backbone that counts its cost once for every image size.

    Subclasses have `run(images)`, the network without the conversion of its output.
    """

    _counted: dict[tuple[int, ...], float]

    def run(self, images: Tensor) -> Tensor:
        """Run the network.

        Args:
            images: Preprocessed images.

        Shape:
            images [B, 3, H, W].
        """
        raise NotImplementedError

    def macs(self, shape: tuple[int, ...]) -> float:
        """Count the multiply-accumulates of convolutions and linear layers for one image.

        Args:
            shape: Channels, height and width of the image.
        """
        counted = self.__dict__.setdefault("_counted", {})
        if shape not in counted:
            counted[shape] = conv_macs(_Plain(self), shape)
        return counted[shape]


class _Plain(nn.Module):
    """A backbone as a module whose forward is `run`."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.run(images)


def conv_macs(module: nn.Module, shape: tuple[int, ...]) -> float:
    """Count the multiply-accumulates of the convolutions and linear layers for one input.

    Projections of PyTorch's and torchvision's attention are among them, the products of queries, keys and
    values are not. The module runs once on the meta device in float32, so nothing is computed and no
    weight is copied.

    Args:
        module: Module whose forward takes one tensor.
        shape: Shape of the input without the batch dimension, such as (3, 224, 224).
    """
    found = [0]

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.MultiheadAttention):
            # Its projections are applied as functions, so that no layer is called.
            tokens, width = inputs[0].shape[-2], layer.embed_dim
            found[0] += tokens * width * (2 * width + layer.kdim + layer.vdim)
        elif type(layer).__name__.startswith("ShiftedWindowAttention"):
            height, across, width = output.shape[1:]
            windows: Any = layer.window_size
            sides = [-(-side // size) * size for side, size in zip((height, across), windows)]
            found[0] += 4 * sides[0] * sides[1] * width**2
        elif isinstance(layer, nn.Linear):
            found[0] += output[0].numel() * layer.in_features
        elif isinstance(layer, nn.Conv2d):
            rows, columns = layer.kernel_size
            fan_in = layer.in_channels // layer.groups * rows * columns
            found[0] += output[0].numel() * fan_in

    kinds = (nn.Conv2d, nn.Linear, nn.MultiheadAttention)
    handles = [
        layer.register_forward_hook(count)
        for layer in module.modules()
        if isinstance(layer, kinds) or type(layer).__name__.startswith("ShiftedWindowAttention")
    ]
    training = {layer: layer.training for layer in module.modules()}
    try:
        module.eval()
        # Whoever counts or follows what goes on, such as `explain`, must not see this run too.
        with torch.no_grad(), _disable_current_modes():
            state: dict[str, Any] = {
                name: torch.empty(
                    value.shape,
                    dtype=torch.float32 if value.is_floating_point() else value.dtype,
                    device="meta",
                )
                for name, value in (*module.named_parameters(), *module.named_buffers())
            }
            functional_call(module, state, (torch.zeros((1, *shape), device="meta"),))
    finally:
        for handle in handles:
            handle.remove()
        for layer, mode in training.items():
            layer.training = mode
    return float(found[0])
