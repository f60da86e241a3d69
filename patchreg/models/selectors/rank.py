"""From the scores of patches to how much of each is used.

Letters: B images, P patches in raster order.
"""

from __future__ import annotations

import math

import torch
from mmengine.model import BaseModule
from torch import Tensor

from patchreg.models.selectors.soft_rank import BACKENDS, soft_rank
from patchreg.registry import SELECTORS
from patchreg.utils.errors import ConfigError, DataError, did_you_mean

NORMS = ("sort", "l2", "minmax", "minmax_image")


def gumbel_noise(uniform: Tensor) -> Tensor:
    """Turn uniform draws into Gumbel noise: -log(-log(U + 1e-20) + 1e-20).

    Source:
        `sample_gumbel` of the official PatchGame.

    Args:
        uniform: Draws from [0, 1).
    """
    return -torch.log(-torch.log(uniform + 1e-20) + 1e-20)


def top_mask(score: Tensor, count: int) -> Tensor:
    """Mark the highest scores of each image.

    Args:
        score: Scores.
        count: How many, from 1 to P.

    Shape:
        score [B, P]; returns [B, P] bool with `count` ones per row.

    Raises:
        DataError: There are fewer scores than that.
    """
    if not 1 <= count <= score.shape[1]:
        raise DataError(
            f"cannot keep {count} of {score.shape[1]} patches; keep 1 to {score.shape[1]}"
        )
    mask = torch.zeros_like(score, dtype=torch.bool)
    # Stable, so that these are the first of the order in which patches are ranked, also among equals.
    return mask.scatter_(1, score.argsort(dim=1, descending=True, stable=True)[:, :count], True)


@SELECTORS.register_module()
class RankSelector(BaseModule):
    """Normalise the scores of an image's patches and weigh each patch by them.

    Without `topk`, a Gumbel-softmax decides between a patch's normalised score r and 1 - r. With it, the
    k highest weigh 1 and the others 0, and gradients pass as if nothing was cut.

    Source:
        "PatchGame: Learning to Signal Mid-level Patches in Referential Games", section 3; `Speaker` of the
        official `patchgame.py`.

    Args:
        norm: `sort`, the soft rank divided by P; `l2`, scores over their norm; `minmax`, scores between
            the extremes of the batch, which carry no gradient; `minmax_image`, of each image.
        strength: Regularisation of the soft rank, above 0, in the unit of the scores.
        backend: Of the soft rank, see `soft_rank`.
        topk: How many patches are used, or None for all, softly.
        temperature: Of the Gumbel-softmax, above 0.
        hard: Round the weights to 0 or 1; gradients are those of the soft weights.
        logits: `rank` decides between r and 1 - r as published; `log` between their logarithms, so that a
            patch is used with probability r.
        count: Divisor of the soft rank, or None for the number of patches at hand.

    Raises:
        ConfigError: An argument is unknown or out of its range.
    """

    def __init__(
        self,
        norm: str = "sort",
        strength: float = 1.0,
        backend: str = "auto",
        topk: int | None = None,
        temperature: float = 1.0,
        hard: bool = False,
        logits: str = "rank",
        count: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("norm", norm, NORMS),
            ("backend", backend, BACKENDS),
            ("logits", logits, ("rank", "log")),
        ):
            if value not in known:
                raise ConfigError(
                    f"{name}={value!r} is unknown.{did_you_mean(value, known)} Use one of {known}"
                )
        if not 0 < strength < math.inf or not 0 < temperature < math.inf:
            raise ConfigError(
                f"strength={strength}, temperature={temperature}: both must exceed 0, and be finite"
            )
        if count is not None and count < 1:
            raise ConfigError(f"count={count}: expected the number of patches, or None")
        if topk is not None and topk < 1:
            raise ConfigError(f"topk={topk}: keep at least 1 patch, or all, softly, with topk=None")
        self.norm = norm
        self.strength = strength
        self.backend = backend
        self.topk = topk
        self.temperature = temperature
        self.hard = hard
        self.logits = logits
        self.count = count

    def normalise(self, score: Tensor) -> Tensor:
        """Return the normalised scores r; with `sort` they lie in [1/P, 1], highest last.

        Args:
            score: Scores; ranked in float32 at least.

        Shape:
            score [B, P]; returns [B, P].
        """
        if self.norm == "sort":
            wide = score.float() if score.element_size() < 4 else score
            return soft_rank(wide, self.strength, self.backend) / (self.count or score.shape[1])
        if self.norm == "l2":
            return score / score.norm(dim=1, keepdim=True).clamp(min=1e-12)
        fixed = score.detach()
        if self.norm == "minmax":
            low, high = fixed.min(), fixed.max()
        else:
            low, high = fixed.amin(dim=1, keepdim=True), fixed.amax(dim=1, keepdim=True)
        # One score for all patches would divide by zero.
        return (score - low) / (high - low).clamp(min=1e-12)

    def forward(self, score: Tensor, uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the normalised scores and the weight of every patch.

        Args:
            score: Scores.
            uniform: Draws from [0, 1) behind the noise, index 0 for "use"; None for no noise. With `topk`
                there is no noise.

        Shape:
            score [B, P]; uniform [B, P, 2]; returns [B, P] twice.
        """
        rank = self.normalise(score)
        if self.topk is not None:
            chosen = top_mask(rank.detach(), self.topk).to(rank.dtype)
            return rank, (chosen - rank).detach() + rank
        if self.logits == "log":
            use = rank.clamp(1e-6, 1 - 1e-6)
            odds = use.log() - (1 - use).log()
        else:
            odds = 2 * rank - 1
        if uniform is not None:
            first, second = gumbel_noise(uniform).unbind(-1)
            odds = odds + first - second
        weight = (odds / self.temperature).sigmoid()
        if self.hard:
            weight = ((weight > 0.5).to(weight.dtype) - weight).detach() + weight
        return rank, weight
