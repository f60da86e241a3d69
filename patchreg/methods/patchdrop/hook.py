"""Schedules of the policy, its budget, and its statistics over an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dist import all_gather, all_reduce
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from patchreg.methods.patchdrop.metric import performance_stats
from patchreg.methods.patchdrop.model import PatchDropClassifier
from patchreg.registry import HOOKS
from patchreg.utils.errors import ConfigError


def patchdrop_model(runner: Any) -> PatchDropClassifier:
    """Return the PatchDropClassifier of a runner, out of its wrapper for several processes.

    Args:
        runner: The runner.

    Raises:
        ConfigError: The model is another one.
    """
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if not isinstance(model, PatchDropClassifier):
        raise ConfigError(
            f"the model is a {type(model).__name__}; this part of the config belongs to a "
            "PatchDropClassifier"
        )
    return model


def alpha_at(epoch: int, epochs: int, start: float, end: float) -> float:
    """Return the exploration factor of an epoch: linear from the first to the last.

    Source:
        The paper's schedule; the official code keeps 0.8.

    Args:
        epoch: Epoch from 0.
        epochs: Epochs of the training.
        start: Factor of the first epoch.
        end: Factor of the last one and of all later ones.
    """
    return start + (end - start) * min(epoch / max(epochs - 1, 1), 1.0)


def active_patches(epoch: int, cells: int) -> torch.Tensor | None:
    """Return which patches are decided about in an epoch of the curriculum.

    Source:
        Stage 1 of the first public version: patches 0 to e in epoch e, the others are kept.

    Args:
        epoch: Epoch from 0.
        cells: Patches P.

    Shape:
        Returns float32 [P], or None from epoch P on, when all are active.
    """
    if epoch >= cells:
        return None
    return (torch.arange(cells) <= epoch).float()


@HOOKS.register_module()
class PatchDropAlphaHook(Hook):
    """Let exploration fade: alpha grows linearly over the epochs.

    Source:
        "Learning When and Where to Zoom With Deep Reinforcement Learning", section 4.

    Args:
        start: Alpha of the first epoch, in (0.5, 1].
        end: Alpha of the last epoch, in (0.5, 1].

    Raises:
        ConfigError: A value is outside.
    """

    def __init__(self, start: float = 0.7, end: float = 0.95) -> None:
        for name, value in (("start", start), ("end", end)):
            if not 0.5 < value <= 1:
                raise ConfigError(f"PatchDropAlphaHook.{name}={value} is outside (0.5, 1]")
        self.start = start
        self.end = end

    def before_train_epoch(self, runner: Any) -> None:
        """Set alpha for the epoch.

        Args:
            runner: The runner.
        """
        alpha = alpha_at(runner.epoch, runner.max_epochs, self.start, self.end)
        patchdrop_model(runner).selector.set_alpha(alpha)


@HOOKS.register_module()
class PatchDropCurriculumHook(Hook):
    """Let the policy decide about one patch more in every epoch; the others are kept.

    Source:
        Stage 1 of the first public version of the PatchDrop repository.
    """

    def before_train_epoch(self, runner: Any) -> None:
        """Set the patches that are decided about in the epoch and in the tests after it.

        Args:
            runner: The runner.
        """
        model = patchdrop_model(runner)
        model.active = active_patches(runner.epoch, model.selector.num_patches)


@HOOKS.register_module()
class PatchDropBudgetHook(Hook):
    """Train for a wanted number of patches: a controller finds the price of a patch.

    The price comes on top of the reward, whether the answer is right or wrong, and may become
    negative; reported rewards are without it. It is the multiplier of the constraint "so many
    patches on average". With the gap e = (kept - target) / P, `kept` being the mean of the decisions
    that an evaluation would take (BatchNorm with its averages), it is proportional * e plus the sum of
    integral * e over all steps. It is part of the checkpoint.

    Source:
        Own; the official code is tuned by the penalty.

    Args:
        target: Wanted mean of kept patches per image.
        proportional: Price for a gap of all patches. Without it the price swings, because the policy
            follows with a delay.
        integral: How fast the price grows while there is a gap.

    Raises:
        ConfigError: `target` or `integral` is not positive, or `proportional` is negative.
    """

    def __init__(self, target: float, proportional: float = 8.0, integral: float = 0.1) -> None:
        if target <= 0 or integral <= 0 or proportional < 0:
            raise ConfigError(
                f"target={target}, proportional={proportional}, integral={integral}: expected "
                "target and integral > 0, proportional >= 0"
            )
        self.target = target
        self.proportional = proportional
        self.integral = integral

    def before_train(self, runner: Any) -> None:
        """Check the target against the grid.

        Args:
            runner: The runner.

        Raises:
            ConfigError: There are not that many patches.
        """
        cells = patchdrop_model(runner).selector.num_patches
        if self.target >= cells:
            raise ConfigError(f"target={self.target}: the grid has {cells} patches; expected less")

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Move the price.

        Args:
            runner: The runner.
            batch_idx: Not used.
            data_batch: Not used.
            outputs: Not used.
        """
        model = patchdrop_model(runner)
        assert model.last_step is not None
        kept = model.decide(model.last_step.overview).sum(1).double().mean()
        all_reduce(kept, "mean")
        loss = model.policy_loss
        gap = (kept - self.target) / model.selector.num_patches
        # The sum so far is the price without its proportional part.
        loss.surcharge += self.integral * gap + self.proportional * (gap - loss.gap)
        loss.gap.copy_(gap)
        runner.message_hub.update_scalar("train/patch_price", loss.surcharge.item())


@HOOKS.register_module()
class PatchDropStatsHook(Hook):
    """Log the policy's statistics over each training epoch, in the words of the official code.

    Acc is the accuracy of the greedy decisions; Rw, S (kept patches), V (their standard deviation)
    and # (different decisions) are of the sampled ones.

    Source:
        The training loops of the PatchDrop repository.
    """

    def __init__(self) -> None:
        self._steps: list[Sequence[torch.Tensor]] = []

    def before_train_epoch(self, runner: Any) -> None:
        """Begin anew.

        Args:
            runner: The runner.
        """
        self._steps = []

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Remember the decisions of a step.

        Args:
            runner: The runner.
            batch_idx: Not used.
            data_batch: Not used.
            outputs: Not used.
        """
        step = patchdrop_model(runner).last_step
        assert step is not None
        self._steps.append(
            (step.sampled.bool(), step.sampled_reward, step.greedy_right, step.greedy_reward)
        )

    def after_train_epoch(self, runner: Any) -> None:
        """Log the statistics.

        Args:
            runner: The runner.
        """
        if not self._steps:
            return
        parts = [torch.cat(part) for part in zip(*self._steps, strict=True)]
        sampled, reward, right, baseline = (torch.cat(all_gather(part)) for part in parts)
        found = performance_stats(sampled, reward, right)
        runner.logger.info(
            f"Train: {runner.epoch} | Acc: {found['accuracy']:.3f} | Rw: {found['reward']:.2E} | "
            f"S: {found['kept_patches_mean']:.3f} | V: {found['kept_patches_std']:.3f} | "
            f"#: {found['unique_policies']:.0f} | greedy Rw: {baseline.mean().item():.2E}"
        )
        self._steps = []
