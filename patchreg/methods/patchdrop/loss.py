"""Reward of a choice of patches, self-critical advantage, and the policy-gradient loss.

Letters: B images, P patches, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from patchreg.registry import LOSSES
from patchreg.utils.errors import ConfigError

REDUCTIONS = ("patch_mean", "patch_sum", "sum")


@LOSSES.register_module()
class PatchDropPolicyLoss(nn.Module):
    """REINFORCE with the greedy choice as baseline.

    A right answer is worth 1 - (kept / P)^power, a wrong one the penalty.

    Source:
        Equations of the reward and of the policy gradient; `utils.compute_reward`, `pretrain.py`
        and `finetune.py` of the PatchDrop repository.

    Args:
        penalty: Reward of a wrong answer, at most 0.
        power: Exponent of the share of kept patches.
        reduction: `patch_mean`, over images and patches (stage 1); `patch_sum`, sum over patches
            and mean over images (stages 2, 3); `sum`, over both (first public version).
        prices: Relative price of each patch, or None for equal ones; the share of kept patches
            becomes the share of the total price.
        form: `penalty`, as above; or `legacy`, (1 - kept / P) + 0.5 [right], of the first public
            version.
        loss_weight: Factor of the loss.

    Raises:
        ConfigError: An argument is unknown or out of its range.
    """

    surcharge: Tensor
    gap: Tensor
    prices: Tensor | None

    def __init__(
        self,
        penalty: float = -0.5,
        power: float = 2.0,
        reduction: str = "patch_mean",
        prices: Sequence[float] | None = None,
        form: str = "penalty",
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ConfigError(f"reduction={reduction!r} is unknown; use one of {REDUCTIONS}")
        if form not in ("penalty", "legacy"):
            raise ConfigError(f"form={form!r} is unknown; use 'penalty' or 'legacy'")
        if penalty > 0:
            warnings.warn(
                f"penalty={penalty} rewards wrong answers; the official values are -0.5 and below",
                stacklevel=2,
            )
        if prices is not None and (min(prices) < 0 or sum(prices) <= 0):
            raise ConfigError(f"prices={list(prices)}: expected none below 0 and a positive sum")
        self.penalty = penalty
        self.power = power
        self.reduction = reduction
        self.form = form
        self.loss_weight = loss_weight
        table = None if prices is None else torch.tensor(prices, dtype=torch.float64)
        self.register_buffer("prices", table, persistent=False)
        # Price of all patches on top of the reward, and the gap between kept and wanted patches that
        # PatchDropBudgetHook saw last: in the checkpoint, so that a resumed run goes on with them.
        self.register_buffer("surcharge", torch.zeros((), dtype=torch.float64))
        self.register_buffer("gap", torch.zeros((), dtype=torch.float64))

    def share(self, actions: Tensor) -> Tensor:
        """Return the share of the patches, or of their price, that is kept.

        Args:
            actions: Decisions, 0 or 1.

        Shape:
            actions [B, P]; returns [B, 1].

        Raises:
            ConfigError: There are not as many prices as patches.
        """
        if self.prices is None:
            return actions.sum(1, keepdim=True) / actions.shape[1]
        if len(self.prices) != actions.shape[1]:
            raise ConfigError(f"{len(self.prices)} prices for {actions.shape[1]} patches")
        floating = actions.is_floating_point()
        prices = self.prices.to(actions.dtype if floating else torch.get_default_dtype())
        return (actions * prices).sum(1, keepdim=True) / prices.sum()

    def reward(self, logits: Tensor, targets: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reward of a choice and whether its prediction is right.

        Args:
            logits: Class logits for the erased image; ties go to the lowest class.
            targets: Labels.
            actions: Decisions, 0 or 1.

        Shape:
            logits [B, K]; targets [B]; actions [B, P]; returns [B, 1] and bool [B].
        """
        right = logits.argmax(dim=1) == targets
        if_right, if_wrong = self.values(actions)
        return torch.where(right.unsqueeze(1), if_right, if_wrong), right

    def values(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a choice is worth with a right and with a wrong answer.

        Args:
            actions: Decisions, 0 or 1.

        Shape:
            actions [B, P]; returns [B, 1] twice.
        """
        share = self.share(actions)
        if self.form == "legacy":
            return 1.5 - share, 1 - share
        return 1 - share.pow(self.power), torch.full_like(share, self.penalty)

    def charge(self, actions: Tensor) -> Tensor:
        """Return what a choice costs on top of its reward, in training for a wanted number of patches.

        Args:
            actions: Decisions, 0 or 1.

        Shape:
            actions [B, P]; returns [B, 1].
        """
        share = self.share(actions)
        return self.surcharge.to(share.dtype) * share

    def forward(self, log_prob: Tensor, advantage: Tensor, active: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            log_prob: Log-probability of each sampled decision.
            advantage: Reward of the sampled minus that of the greedy choice; no gradient passes.
            active: 1 for the patches that are learned already (curriculum), or None for all.

        Shape:
            log_prob [B, P]; advantage [B, 1]; active [P]; returns a scalar.
        """
        terms = -log_prob * advantage.detach()
        if active is not None:
            terms = terms * active
        if self.reduction == "patch_mean":
            loss = terms.mean()
        elif self.reduction == "patch_sum":
            loss = terms.sum(1).mean()
        else:
            loss = terms.sum()
        return self.loss_weight * loss
