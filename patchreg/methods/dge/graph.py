"""Evaluation of DGE from captured CUDA graphs, for batches so small that launching costs most.

Letters: B images, N tokens, L packed queries of a block for the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from patchreg.methods.dge.model import DGEClassifier, DGEVisionTransformerBackbone
from patchreg.utils.errors import ConfigError

ROWS = 64  # Capacities are multiples of this, as the tiles of matrix products are.


class GraphOutput(NamedTuple):
    """What a pass returns.

    Args:
        output: Logits of a classifier, tokens of a backbone.
        macs: Multiply-accumulates executed for every image (corrected); rows that only fill up the
            capacity are not among them.
        rows: Packed queries of every routed block.

    Shape:
        output [B, K] or [B, N, C]; macs [B] float64; rows [blocks] int64.
    """

    output: Tensor
    macs: Tensor
    rows: Tensor


class DGEGraphRunner:
    """Evaluates a DGE model from a captured CUDA graph, with the results of the eager model.

    A graph repeats launches of fixed shapes, but the routers choose how many queries there are. So
    every block computes a fixed number of rows, its capacity: spare rows are computed for nothing,
    and nobody reads them. A batch that needs more rows runs eagerly, and the next one of its size is
    captured anew with more rows. Weights may change in place at any time; routers that are shifted
    to another budget are captured anew.

    Args:
        model: `DGEClassifier` or `DGEVisionTransformerBackbone`, on any device; without CUDA it
            runs eagerly, and says so once.
        margin: Spare rows, relative to the block with most rows of the batch that is captured.

    Raises:
        ConfigError: Another model, or a negative margin.
    """

    def __init__(self, model: nn.Module, margin: float = 0.1) -> None:
        backbone = model.backbone if isinstance(model, DGEClassifier) else model
        if not isinstance(backbone, DGEVisionTransformerBackbone):
            raise ConfigError(
                f"a {type(backbone).__name__} has no fixed row capacity; graphs are for a "
                "DGEVisionTransformerBackbone or a DGEClassifier around one"
            )
        if not margin >= 0:
            raise ConfigError(f"margin={margin}: expected a share of 0 or more, such as 0.1")
        self.model = model
        self.backbone = backbone
        self.margin = margin
        self.captures = 0
        self.eager = 0
        self._graphs: dict[tuple, _Captured] = {}
        self._told: set[str] = set()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> GraphOutput:
        """Evaluate one batch.

        Args:
            images: Preprocessed images.

        Shape:
            images [B, 3, H, W].

        Raises:
            ConfigError: The model is in training mode or evaluates all candidates.
        """
        if self.model.training or self.backbone.eval_path != "sparse":
            raise ConfigError(
                "a graph repeats sparse evaluation: call model.eval() and set eval_path='sparse'"
            )
        if not len(images):
            return self._eager(images)
        if not self._can_capture(images):
            self._tell(
                f"a graph needs CUDA, images in the type of the weights and no autocast, not "
                f"{images.dtype} on {images.device.type}: batches run eagerly"
            )
            return self._eager(images)
        key = (tuple(images.shape), images.dtype, images.device)
        shifts = self._shifts()
        held = self._graphs.get(key)
        if held is None or not held.fits(shifts):
            result = self._eager(images)
            rows = int(result.rows.max()) if len(result.rows) else 0
            most = held.most if held is not None else 0
            capacity = self._capacity(images, max(rows, most))
            self._graphs[key] = self._capture(images, capacity, shifts)
            return result
        result = held.replay(images)
        most = int(result.rows.max()) if len(result.rows) else 0
        if most <= held.capacity:
            return result
        self._tell(
            f"a batch of {len(images)} needs {most} rows, more than the captured {held.capacity}: "
            "it runs eagerly, and the next one is captured with more (a larger margin avoids that)"
        )
        held.outgrown, held.most = True, most
        return self._eager(images)

    def _can_capture(self, images: Tensor) -> bool:
        same = images.dtype == self.backbone.norm.weight.dtype
        return images.is_cuda and same and not torch.is_autocast_enabled("cuda")

    def _capacity(self, images: Tensor, rows: int) -> int:
        """Rows to capture, at most one per token."""
        size = self.backbone.patch_embed.patch_size
        tokens = self.backbone.extra + (images.shape[2] // size) * (images.shape[3] // size)
        wanted = math.ceil(rows * (1 + self.margin) / ROWS) * ROWS
        return max(min(wanted, len(images) * tokens), 1)

    def _shifts(self) -> list[Tensor | None]:
        blocks: Any = self.backbone.blocks
        # A router may be wrapped in a module of another kind, which then has no offset.
        return [getattr(block.dge.router, "offset", None) for block in blocks]

    def _capture(self, images: Tensor, capacity: int, shifts: list[Tensor | None]) -> _Captured:
        self.captures += 1
        self.backbone.row_capacity = capacity
        try:
            return _Captured(self._forward, images, capacity, shifts)
        finally:
            self.backbone.row_capacity = None

    def _eager(self, images: Tensor) -> GraphOutput:
        self.eager += 1
        return self._forward(images)

    def _forward(self, images: Tensor) -> GraphOutput:
        if isinstance(self.model, DGEClassifier):
            features = self.model.extract(images)
            output = self.model.head(features)
        else:
            features = self.model(images)
            output = features.tokens
        routing = features.routing
        rows = [block.queries.sum() for block in routing.routed]
        empty = torch.zeros(0, dtype=torch.int64, device=images.device)
        return GraphOutput(
            output, routing.executed("corrected"), torch.stack(rows).long() if rows else empty
        )

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            print_log(f"DGEGraphRunner: {message}", logger="current")


class _Captured:
    """One graph with its memory."""

    def __init__(
        self,
        forward: Callable[[Tensor], GraphOutput],
        images: Tensor,
        capacity: int,
        shifts: list[Tensor | None],
    ) -> None:
        self.capacity = capacity
        self.shifts = shifts  # Kept alive: the graph reads them.
        self.outgrown = False
        self.most = 0
        self.images = images.clone()
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # Libraries set themselves up in their first calls.
                forward(self.images)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        with torch.cuda.device(images.device):  # A capture takes a stream of the current device.
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.held = forward(self.images)

    def fits(self, shifts: list[Tensor | None]) -> bool:
        """Whether the graph is still right for these shifts of the routers."""
        same = all(left is right for left, right in zip(self.shifts, shifts, strict=True))
        return same and not self.outgrown

    def replay(self, images: Tensor) -> GraphOutput:
        """Run the graph on a batch."""
        self.images.copy_(images)
        self.graph.replay()
        return GraphOutput(*(value.clone() for value in self.held))
