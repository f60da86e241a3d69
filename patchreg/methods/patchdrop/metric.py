"""What a policy decided, over a whole data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor

from patchreg.registry import METRICS
from patchreg.utils.errors import DataError


def performance_stats(actions: Tensor, rewards: Tensor, right: Tensor) -> dict[str, float]:
    """Summarise decisions over images.

    Source:
        `utils.performance_stats` of the PatchDrop repository.

    Args:
        actions: Decisions, 0 or 1.
        rewards: Reward of each image.
        right: Whether each prediction is right.

    Shape:
        actions [N, P]; rewards [N] or [N, 1]; right [N].

    Returns:
        `accuracy` (share), `reward`, `kept_patches_mean`, `kept_patches_std` (unbiased, 0 for one
        image) and `unique_policies`; `sparsity` and `variance` are the official names of the second
        and the third.

    Differs from official:
        There one image gives NaN.
    """
    kept = actions.double().sum(1)
    mean, spread = kept.mean().item(), kept.std().item() if len(kept) > 1 else 0.0
    return {
        "accuracy": right.double().mean().item(),
        "reward": rewards.double().mean().item(),
        "kept_patches_mean": mean,
        "kept_patches_std": spread,
        "sparsity": mean,
        "variance": spread,
        "unique_policies": float(len(actions.bool().unique(dim=0))),
    }


@METRICS.register_module()
class PatchDropPolicyMetric(BaseMetric):
    """Accuracy, reward and kept patches of a policy, over all images.

    `blank_accuracy` is the accuracy of always answering what is predicted when nothing is acquired:
    the share of the reward that comes for free.

    Source:
        `utils.performance_stats` of the PatchDrop repository.

    Args:
        per_class: Report the mean of kept patches of every class too.
        collect_device: Where results of several processes meet, `cpu` or `gpu`.
        prefix: Prefix of the reported names.
    """

    default_prefix = "policy"

    def __init__(
        self, per_class: bool = False, collect_device: str = "cpu", prefix: str | None = None
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.per_class = per_class

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Take in one batch.

        Args:
            data_batch: Not used.
            data_samples: Predictions with `patch_keep`, `patch_rewards` and `gt_label`.

        Raises:
            DataError: A prediction tells no decisions.
        """
        for sample in data_samples:
            if "patch_keep" not in sample:
                raise DataError(
                    "the predictions tell no decisions (patch_keep); PatchDropPolicyMetric belongs "
                    "to a PatchDropClassifier"
                )
            label = int(sample["gt_label"])
            right = int(sample["pred_label"]) == label
            if_right, if_wrong = sample["patch_rewards"]
            reward = if_right if right else if_wrong
            self.results.append(
                (sample["patch_keep"], reward, right, label, sample["blank_label"] == label)
            )

    def compute_metrics(self, results: list[tuple]) -> dict[str, float]:
        """Summarise all images; accuracies in percent.

        Args:
            results: Decisions, reward, whether right, label and whether blank is right, of each
                image.
        """
        actions, rewards, right, labels, blank = zip(*results, strict=True)
        kept = torch.stack(actions)
        label = torch.tensor(labels)
        found = performance_stats(kept, torch.tensor(rewards), torch.tensor(right))
        found["accuracy"] *= 100
        found["blank_accuracy"] = 100 * sum(blank) / len(blank)
        if self.per_class:
            for index in label.unique().tolist():
                mean = kept[label == index].double().sum(1).mean().item()
                found[f"kept_class{index}"] = mean
        return found
