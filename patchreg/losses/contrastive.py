"""Symmetric contrastive loss between two embeddings of each image, inside the global batch.

Letters: B images of this process, W processes, R embedding, C bottleneck channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.dist import get_dist_info
from torch import Tensor, nn

from patchreg.registry import LOSSES
from patchreg.utils.errors import ConfigError, did_you_mean

GATHERS = ("detached", "own", "full", "none")


class _Gather(torch.autograd.Function):
    """Rows of all processes in the order of their ranks; gradients are summed over the processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes in the order of their ranks, with gradient.

    The gradient of a row is the sum over the losses of all processes; in one process the rows are returned
    as they are.

    Args:
        rows: As many as in every other process.

    Shape:
        rows [B, R]; returns [W * B, R].
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _Gather.apply(rows)


@dataclass(eq=False)
class Embedding:
    """One side of the comparison.

    Args:
        rows: Embeddings, not normalised.
        bottleneck: What the rows are a linear image of, or None.
        weight: The linear map: `rows = bottleneck @ weight.T`.

    Shape:
        rows [B, R]; bottleneck [B, C]; weight [R, C].
    """

    rows: Tensor
    bottleneck: Tensor | None = None
    weight: Tensor | None = None

    def map(self, function: Any) -> Embedding:
        """Apply a function to the tensors that are there.

        Args:
            function: From tensor to tensor.
        """
        narrow, weight = (
            None if part is None else function(part) for part in (self.bottleneck, self.weight)
        )
        return Embedding(function(self.rows), narrow, weight)


@LOSSES.register_module()
class ContrastiveLoss(nn.Module):
    """Cross-entropy of finding the other embedding of an image among those of the global batch.

    Both embeddings ask: `logits = [s a B^T; s b A^T]` with a, b the normalised local rows, A, B those of
    all processes, s the scale.

    Source:
        "PatchGame: Learning to Signal Mid-level Patches in Referential Games", section 3.3;
        `PatchGame.forward` and `concat_all_gather` of the official code.

    Args:
        gather: `detached` compares with all processes, without gradient through what is compared with, the
            own rows included, as published; `own` lets it through the own rows; `full` through all;
            `none` compares within the process, with gradient.
        bottleneck: Send the bottleneck (C numbers and a norm per row) between processes instead of the
            embedding (R): the same logits, since the last layer is linear and shared.
        max_scale: Upper bound of the scale, or None.
        loss_weight: Factor on the loss.

    Raises:
        ConfigError: Unknown `gather`.
    """

    def __init__(
        self,
        gather: str = "detached",
        bottleneck: bool = False,
        max_scale: float | None = None,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if gather not in GATHERS:
            raise ConfigError(
                f"gather={gather!r} is unknown.{did_you_mean(gather, GATHERS)} Use one of {GATHERS}"
            )
        self.gather = gather
        self.bottleneck = bottleneck
        self.max_scale = max_scale
        self.loss_weight = loss_weight

    def logits(self, first: Embedding, second: Embedding, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of both directions and the columns that are right.

        Args:
            first: One embedding of the images.
            second: The other.
            scale: Factor on the cosines, above 0.

        Shape:
            Returns [2 B, W * B] and [2 B] int64.
        """
        if self.max_scale is not None:
            scale = scale.clamp(max=self.max_scale)
        both = (self._compare(first, second, scale), self._compare(second, first, scale))
        rank = 0 if self.gather == "none" else get_dist_info()[0]
        rows = len(first.rows)
        target = torch.arange(rank * rows, (rank + 1) * rows, device=first.rows.device)
        return torch.cat(both), target.repeat(2)

    def _compare(self, asking: Embedding, other: Embedding, scale: Tensor) -> Tensor:
        """Return the scaled cosines of the local rows with those of all processes."""
        query = scale * asking.rows / asking.rows.norm(dim=1, keepdim=True)
        if self.gather == "none":
            return query @ (other.rows / other.rows.norm(dim=1, keepdim=True)).T
        live = other
        if self.gather != "full":
            other = other.map(Tensor.detach)
        norm = other.rows.norm(dim=1, keepdim=True)
        if self.bottleneck and other.bottleneck is not None and other.weight is not None:
            sent = gather_rows(other.bottleneck / norm)
            logits = (query @ other.weight) @ sent.T
        else:
            logits = query @ gather_rows(other.rows / norm).T
        if self.gather != "own":
            return logits
        rank, rows = get_dist_info()[0], len(live.rows)
        own = query @ (live.rows / live.rows.norm(dim=1, keepdim=True)).T
        return torch.cat((logits[:, : rank * rows], own, logits[:, (rank + 1) * rows :]), dim=1)

    def forward(
        self, first: Embedding, second: Embedding, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the logits and the columns that are right; computed in float32 at least.

        Args:
            first: One embedding of the images.
            second: The other.
            scale: Factor on the cosines, above 0.

        Shape:
            Returns a number, [2 B, W * B] and [2 B] int64.
        """
        with torch.autocast(first.rows.device.type, enabled=False):
            logits, target = self.logits(first.map(_wide), second.map(_wide), scale)
            return self.loss_weight * F.cross_entropy(logits, target), logits, target


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() < 4 else tensor


NEVER = torch.iinfo(torch.int64).max
"""Place of a target that is not a number, behind every k."""


def match_places(logits: Tensor, target: Tensor) -> Tensor:
    """Return how many columns come before the target, equal ones in their order; `NEVER` for NaN.

    Args:
        logits: Scores.
        target: Column that is right.

    Shape:
        logits [N, M]; target [N]; returns int64 [N].
    """
    own = logits.gather(1, target[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < target[:, None]
    # Written so that a NaN comes before everything.
    place = (~(logits <= own) | ((logits == own) & earlier)).sum(dim=1)
    return torch.where(own[:, 0].isnan(), NEVER, place)


def matching_accuracy(logits: Tensor, target: Tensor, ks: tuple[int, ...] = (1, 5)) -> list[Tensor]:
    """Return the percentage of rows whose target is among the k highest.

    Args:
        logits: Scores.
        target: Column that is right.
        ks: Values of k; a k above the number of columns counts as all of them.

    Shape:
        logits [N, M]; target [N]; returns one number per k.
    """
    place = match_places(logits, target)
    return [100.0 * (place < k).float().mean() for k in ks]
