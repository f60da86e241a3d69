"""The policy: from an overview of the scene to the patches that are acquired.

Letters: B images, P patches in raster order, C channels of the overview's features.
"""

from __future__ import annotations

from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from patchreg.models.base import TokenFeatures
from patchreg.registry import MODELS, SELECTORS
from patchreg.utils.errors import ConfigError, DataError
from patchreg.utils.random import batch_random


def bounded_probability(probability: Tensor, alpha: float) -> Tensor:
    """Keep probabilities away from 0 and 1, so that every action is tried.

    Source:
        Equation of the exploration factor; b = alpha p + (1 - alpha) (1 - p).

    Args:
        probability: Probability of keeping each patch.
        alpha: Exploration factor in (0.5, 1]; 1 changes nothing.
    """
    return alpha * probability + (1 - alpha) * (1 - probability)


def log_probability(actions: Tensor, bounded: Tensor) -> Tensor:
    """Return the log-probability of every decision.

    Args:
        actions: Sampled decisions, 0 or 1.
        bounded: Probability of keeping, after `bounded_probability`; clamped by the machine epsilon
            of its type, which matters for alpha = 1 only.

    Shape:
        actions, bounded [B, P]; returns [B, P].
    """
    epsilon = torch.finfo(bounded.dtype).eps
    clamped = bounded.clamp(epsilon, 1 - epsilon)
    return actions * clamped.log() + (1 - actions) * torch.log1p(-clamped)


def keep_best(probability: Tensor, count: int) -> Tensor:
    """Keep the patches with the highest probability, the lower index first on ties.

    Args:
        probability: Probability or score of each patch.
        count: Patches per image.

    Shape:
        probability [B, P]; returns bool [B, P].
    """
    order = probability.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(probability, dtype=torch.bool).scatter_(1, order, True)


@SELECTORS.register_module()
class PatchDropSelector(BaseModule):
    """Policy network: an overview in, one independent keep-probability per patch out.

    Source:
        "Learning When and Where to Zoom With Deep Reinforcement Learning", section 3; the agent of
        the PatchDrop repository.

    Args:
        backbone: Config of a backbone that returns `TokenFeatures`.
        in_channels: Features that the last layer reads.
        num_patches: Patches P.
        alpha: Exploration factor in training, in (0.5, 1].
        pool: `mean` averages the feature map as the official networks do; `flatten` keeps where
            things are (`in_channels` is then channels times cells of the map).
        threshold: At test time a patch is kept from this probability on.
        top_k: At test time keep this many patches instead, or None.
        min_keep: At test time keep at least this many patches.
        value_outputs: Outputs of the value head of the first public version, which no loss uses and
            which is kept for its checkpoints only; 0 for none.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: An argument is out of its range.
    """

    def __init__(
        self,
        backbone: dict,
        in_channels: int,
        num_patches: int = 16,
        alpha: float = 0.8,
        pool: str = "mean",
        threshold: float = 0.5,
        top_k: int | None = None,
        min_keep: int = 0,
        value_outputs: int = 0,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if pool not in ("mean", "flatten"):
            raise ConfigError(f"pool={pool!r} is unknown; use 'mean' or 'flatten'")
        if not 0 < threshold < 1:
            raise ConfigError(f"threshold={threshold} is outside (0, 1); 0.5 is usual")
        for name, value in (("top_k", top_k), ("min_keep", min_keep)):
            if value is not None and not 0 <= value <= num_patches:
                raise ConfigError(f"{name}={value} is outside [0, {num_patches}]")
        if top_k is not None and top_k < min_keep:
            raise ConfigError(f"top_k={top_k} keeps fewer patches than min_keep={min_keep}")
        self.num_patches = num_patches
        self.set_alpha(alpha)
        self.pool = pool
        self.threshold = threshold
        self.top_k = top_k
        self.min_keep = min_keep
        self.backbone = MODELS.build(backbone)
        self.logit = nn.Linear(in_channels, num_patches)
        self.value: nn.Linear | None = None
        if value_outputs:
            self.value = nn.Linear(in_channels, value_outputs).requires_grad_(False)

    def set_alpha(self, alpha: float) -> None:
        """Set the exploration factor.

        Args:
            alpha: In (0.5, 1]. At 0.5 nothing could be learned, below it actions would be inverted.

        Raises:
            ConfigError: It is outside.
        """
        if not 0.5 < alpha <= 1:
            raise ConfigError(f"alpha={alpha} is outside (0.5, 1]; the official code uses 0.8")
        self.alpha = alpha

    def features(self, overview: Tensor) -> tuple[Tensor, float]:
        """Return what the last layer reads, and the cost of the backbone.

        Args:
            overview: Normalised low-resolution images.

        Shape:
            overview [B, 3, h, w]; returns [B, C].
        """
        found: TokenFeatures = self.backbone(overview)
        tokens = found.tokens
        return (tokens.mean(1) if self.pool == "mean" else tokens.flatten(1)), found.dense_macs

    def forward(self, overview: Tensor) -> tuple[Tensor, float]:
        """Return the logits of keeping, at least in float32, and the cost of the network.

        Args:
            overview: Normalised low-resolution images.

        Shape:
            overview [B, 3, h, w]; logits [B, P].

        Raises:
            DataError: A logit is NaN.
        """
        pooled, macs = self.features(overview)
        logits = self.logit(pooled)
        logits = logits.float() if logits.element_size() < 4 else logits
        # A compiler captures no check of values.
        if not torch.compiler.is_compiling() and bool(logits.isnan().any()):
            raise DataError(
                "the policy gives NaN probabilities; the training diverged (lower the learning "
                "rate) or the images hold NaN"
            )
        return logits, macs + self.logit.in_features * self.logit.out_features

    def values(self, overview: Tensor) -> Tensor:
        """Return the value head's outputs.

        Args:
            overview: Normalised low-resolution images.

        Shape:
            overview [B, 3, h, w]; returns [B, value_outputs].

        Raises:
            ConfigError: There is no value head.
        """
        if self.value is None:
            raise ConfigError("the policy has no value head; set value_outputs")
        return self.value(self.features(overview)[0])

    def draws(self, overview: Tensor, dtype: torch.dtype) -> Tensor:
        """Draw what `sample` compares with, keyed by the training step.

        Args:
            overview: Images, for their number and device.
            dtype: Type of the result.

        Shape:
            Returns [B, P] in [0, 1).
        """
        return batch_random.uniform(len(overview), (self.num_patches,), overview.device, dtype)

    def sample(self, bounded: Tensor, uniform: Tensor) -> Tensor:
        """Return sampled decisions: 1 where the draw lies below the bounded probability.

        Args:
            bounded: Bounded probability of keeping.
            uniform: Draws from [0, 1).

        Shape:
            bounded, uniform [B, P]; returns [B, P] in the same type.
        """
        return (uniform < bounded).to(bounded.dtype)

    def greedy(self, bounded: Tensor) -> Tensor:
        """Return the most probable decisions while training; at exactly 0.5 the patch is kept.

        Args:
            bounded: Bounded probability of keeping.

        Shape:
            bounded [B, P]; returns [B, P] in the same type.
        """
        return (bounded >= 0.5).to(bounded.dtype)

    def decide(self, probability: Tensor) -> Tensor:
        """Return the decisions of an evaluation, by threshold or by count.

        Args:
            probability: Probability of keeping, not bounded.

        Shape:
            probability [B, P]; returns bool [B, P].
        """
        if self.top_k is not None:
            return keep_best(probability, self.top_k)
        kept = probability >= self.threshold
        return kept | keep_best(probability, self.min_keep) if self.min_keep else kept


PATTERNS = ("rows", "columns", "centre", "stochastic", "random", "all", "none")


def pattern_order(pattern: str, grid: tuple[int, int]) -> Tensor:
    """Return the cells of a grid in the order in which a fixed policy takes them.

    Args:
        pattern: `rows` or `columns` nearest to the centre first, or `centre` for the nearest cells.
        grid: Rows and columns.

    Shape:
        Returns int64 [P].
    """
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64) - (grid[0] - 1) / 2,
        torch.arange(grid[1], dtype=torch.float64) - (grid[1] - 1) / 2,
        indexing="ij",
    )
    y, x = rows.flatten() / grid[0], columns.flatten() / grid[1]
    # The small terms only order cells of equal distance: along the row, or the column, from its middle.
    key = {"rows": y.abs() + 1e-3 * x.abs(), "columns": x.abs() + 1e-3 * y.abs()}
    distance = key.get(pattern, (y.square() + x.square()).sqrt())
    first = {"rows": y, "columns": x}.get(pattern)
    if first is not None:
        # Of two rows equally far from the centre, one is finished before the other is begun.
        distance = distance + 1e-2 * (first > 0)
    return distance.argsort(stable=True)


@SELECTORS.register_module()
class PatchDropFixedSelector(BaseModule):
    """Baselines without a network: policies that do not look at the image.

    `rows` (Fixed-H), `columns` (Fixed-V) and `centre` always take the same cells; `stochastic` draws
    cells one by one, those near the centre with a higher chance; `random` draws them evenly; `all`
    and `none` are the two ends.

    Source:
        Baselines of the paper, section 4 (its exact survival probabilities are not published).

    Args:
        pattern: One of those names.
        grid: Rows and columns.
        keep: Mean patches per image; a fraction is met by taking one more in that share of the
            images.
        sharpness: How much `stochastic` prefers the centre: the chance of a cell is proportional to
            exp(-sharpness * distance), distance 1 being half the image's diagonal.
        seed: Seed of the draws of an evaluation, which are the same for the same images in the same
            order; those of a training are keyed by the step.
        init_cfg: As in MMEngine; there are no weights.

    Raises:
        ConfigError: The pattern is unknown, or `keep` does not fit the grid.
    """

    threshold = 0.5

    def __init__(
        self,
        pattern: str,
        grid: tuple[int, int] = (4, 4),
        keep: float = 8,
        sharpness: float = 2.0,
        seed: int = 0,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.grid = (grid[0], grid[1])
        self.num_patches = grid[0] * grid[1]
        if pattern not in PATTERNS:
            raise ConfigError(f"pattern={pattern!r} is unknown; use one of {PATTERNS}")
        if not 0 <= keep <= self.num_patches:
            raise ConfigError(f"keep={keep} is outside [0, {self.num_patches}]")
        self.pattern = pattern
        self.keep = {"all": self.num_patches, "none": 0}.get(pattern, keep)
        self.sharpness = sharpness
        self.generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.alpha = 1.0

    def train(self, mode: bool = True) -> PatchDropFixedSelector:
        """Switch the mode; an evaluation begins the draws anew.

        Args:
            mode: True for training.
        """
        if not mode:
            self.generator.manual_seed(self.seed)
        return super().train(mode)

    def scores(self, images: int) -> Tensor:
        """Return how early each cell is taken, higher first.

        Args:
            images: Images B.

        Shape:
            Returns float32 [B, P].
        """
        if self.pattern in ("random", "stochastic"):
            uniform = self._uniform(images, self.num_patches)
            gumbel = -torch.log(-torch.log(uniform.clamp(2.0**-25, 1 - 2.0**-24)))
            return (
                gumbel - self.sharpness * self._distance()
                if self.pattern == "stochastic"
                else gumbel
            )
        order = pattern_order(self.pattern, self.grid)
        rank = torch.empty(self.num_patches).scatter_(
            0, order, torch.arange(self.num_patches, 0.0, -1.0)
        )
        return rank.expand(images, -1)

    def _uniform(self, images: int, columns: int) -> Tensor:
        if self.training:
            return batch_random.uniform(images, (columns,), "cpu")
        return torch.rand(images, columns, generator=self.generator)

    def _distance(self) -> Tensor:
        rows, columns = self.grid
        y = (torch.arange(rows) - (rows - 1) / 2) / rows
        x = (torch.arange(columns) - (columns - 1) / 2) / columns
        return (y[:, None].square() + x.square()).sqrt().flatten() / 0.5**0.5

    def forward(self, overview: Tensor) -> tuple[Tensor, float]:
        """Return logits whose sign is the decision; they cost nothing.

        Args:
            overview: Images, for their number and device.

        Shape:
            overview [B, 3, h, w]; returns [B, P].
        """
        scores = self.scores(len(overview))
        whole = int(self.keep)
        extra = self._uniform(len(overview), 1)[:, 0] < self.keep - whole
        count = whole + extra.long()
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        kept = rank < count[:, None]
        return torch.where(kept, 20.0, -20.0).to(overview.device), 0.0

    def draws(self, overview: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what `sample` ignores.

        Args:
            overview: Images, for their number and device.
            dtype: Type of the result.

        Shape:
            Returns [B, P].
        """
        return overview.new_zeros(len(overview), self.num_patches, dtype=dtype)

    def sample(self, bounded: Tensor, uniform: Tensor) -> Tensor:
        """Return the decisions; there is nothing to explore.

        Args:
            bounded: Probability of keeping.
            uniform: Not used.

        Shape:
            Returns [B, P].
        """
        return self.greedy(bounded)

    def greedy(self, bounded: Tensor) -> Tensor:
        """Return the decisions.

        Args:
            bounded: Probability of keeping.

        Shape:
            bounded [B, P]; returns [B, P] in the same type.
        """
        return (bounded >= 0.5).to(bounded.dtype)

    def decide(self, probability: Tensor) -> Tensor:
        """Return the decisions.

        Args:
            probability: Probability of keeping.

        Shape:
            probability [B, P]; returns bool [B, P].
        """
        return probability >= 0.5

    def set_alpha(self, alpha: float) -> None:
        """Do nothing: there is no exploration.

        Args:
            alpha: Not used.
        """


def selector_of(model: Any) -> Any:
    """Return the policy of a model, or say that it has none.

    Args:
        model: A model.

    Raises:
        ConfigError: The model is no PatchDropClassifier.
    """
    selector = getattr(model, "selector", None)
    if selector is None:
        raise ConfigError(
            f"{type(model).__name__} has no policy (selector); use a PatchDropClassifier"
        )
    return selector
