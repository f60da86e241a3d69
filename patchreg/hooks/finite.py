"""Stopping a training whose loss is not a number any more, before anything is lost."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor

from patchreg.registry import HOOKS
from patchreg.utils.errors import DataError

_SHOWN = 8


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stop when the loss becomes infinite or NaN, and name the images of that batch.

    Losses are read every few iterations, so that a GPU is not waited for, and before every checkpoint, so
    that the newest one is always from before.

    Args:
        interval: Iterations between two checks, at least 1.
    """

    priority = "ABOVE_NORMAL"

    def __init__(self, interval: int = 50) -> None:
        if interval < 1:
            raise DataError(f"FiniteLossHook: interval={interval}; expected at least 1")
        self.interval = interval
        self._kept: list[tuple[int, dict[str, Any], Any]] = []

    def before_train(self, runner: Any) -> None:
        """Forget an earlier run."""
        self._kept.clear()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Keep the losses of this iteration and the names of its images; check now and then.

        Raises:
            DataError: A loss is not finite.
        """
        samples = data_batch.get("data_samples") if isinstance(data_batch, dict) else None
        self._kept.append((runner.iter, outputs or {}, samples))
        if len(self._kept) >= self.interval:
            self._check()

    def after_train_epoch(self, runner: Any) -> None:
        """Check before a validation."""
        self._check()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Check before weights are written."""
        self._check()

    def _check(self) -> None:
        kept, self._kept = self._kept, []
        totals = [
            outputs["loss"] for _, outputs, _ in kept if isinstance(outputs.get("loss"), Tensor)
        ]
        if len(totals) != len(kept) or not totals:
            return
        finite = torch.stack([total.detach() for total in totals]).isfinite().tolist()
        if all(finite):
            return
        iteration, outputs, samples = kept[finite.index(False)]
        parts = ", ".join(
            f"{key} {float(value):.4g}" for key, value in outputs.items() if "loss" in key
        )
        raise DataError(
            f"the loss is not finite in iteration {iteration + 1}: {parts}. Images of the batch: "
            f"{_names(samples)}. The newest checkpoint is from before. Look at these images, or lower "
            "optim_wrapper.optimizer.lr, clip gradients (optim_wrapper.clip_grad) or train in float32"
        )


def _names(samples: Any) -> str:
    names = []
    for sample in samples or ():
        name = getattr(sample, "img_path", None)
        if name is None:
            name = getattr(sample, "sample_idx", None)
            name = None if name is None else f"sample {int(name)}"
        if name is not None:
            names.append(str(name))
    if not names:
        return "not told by the data set"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
