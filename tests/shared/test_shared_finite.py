"""A loss that is not finite ends a run in words, and no checkpoint holds its weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from patchreg.hooks.finite import FiniteLossHook
from patchreg.utils.errors import DataError


def iterate(hook: FiniteLossHook, losses: list[float], **names: list) -> None:
    for step, value in enumerate(losses):
        samples = [
            SimpleNamespace(**{key: column[step] for key, column in names.items()}),
            SimpleNamespace(**{key: column[step] for key, column in names.items()}),
        ]
        loss = torch.tensor(value)
        outputs = {"loss": loss, "loss_cls": loss, "accuracy": torch.tensor(float("nan"))}
        hook.after_train_iter(SimpleNamespace(iter=step), step, {"data_samples": samples}, outputs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_first_bad_iteration_and_its_images_are_named(bad: float) -> None:
    hook = FiniteLossHook(interval=4)
    with pytest.raises(DataError) as error:
        iterate(hook, [1.0, bad, bad, 2.0], img_path=["a.png", "b.png", "c.png", "d.png"])
    text = str(error.value)
    assert "in iteration 2: loss " in text
    assert "b.png, b.png. The newest" in text
    assert "accuracy" not in text


def test_losses_are_read_before_anything_is_saved_or_validated() -> None:
    for event in ("before_save_checkpoint", "after_train_epoch"):
        hook = FiniteLossHook()
        iterate(hook, [1.0, float("nan")], sample_idx=[5, 6])
        arguments = (None, {}) if event == "before_save_checkpoint" else (None,)
        with pytest.raises(DataError, match="Images of the batch: sample 6, sample 6"):
            getattr(hook, event)(*arguments)


def test_finite_losses_pass_and_are_forgotten() -> None:
    hook = FiniteLossHook(interval=2)
    iterate(hook, [1.0, 2.0, 3.0], sample_idx=[0, 1, 2])
    assert len(hook._kept) == 1
    hook.before_train(None)
    hook.before_save_checkpoint(None, {})
    with pytest.raises(DataError, match="interval=0"):
        FiniteLossHook(interval=0)
