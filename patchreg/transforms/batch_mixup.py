"""Mixup and CutMix on a batch, with smoothed labels."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from patchreg.registry import TRANSFORMS
from patchreg.utils.errors import ConfigError
from patchreg.utils.random import batch_random

Box = tuple[int, int, int, int]
SCOPES = ("process", "global")


def smoothed_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Return one-hot targets with label smoothing.

    Args:
        labels: Class indices.
        num_classes: K.
        smoothing: s in [0, 1): the label gets 1 - s + s / K, every other class s / K.

    Shape:
        labels [B], returns [B, K] float32.
    """
    off = smoothing / num_classes
    shape = len(labels), num_classes
    targets = torch.full(shape, off, dtype=torch.float32, device=labels.device)
    return targets.scatter_(1, labels.view(-1, 1), 1.0 - smoothing + off)


def mixup(x: Tensor, partner: Tensor, lam: float) -> Tensor:
    """Blend every image with its partner.

    Source: Zhang et al., "mixup", arXiv:1710.09412, eq. in section 1.

    Args:
        x: Images.
        partner: Image mixed into each.
        lam: Share of `x`, in [0, 1].

    Shape:
        x, partner, result [B, C, H, W].
    """
    return torch.lerp(partner, x, lam)


def cutmix(x: Tensor, partner: Tensor, box: Box) -> Tensor:
    """Replace a box in every image by that of its partner.

    Source: Yun et al., "CutMix", arXiv:1905.04899, eq. 1.

    Args:
        x: Images.
        partner: Image the box is taken from.
        box: (y0, y1, x0, x1) in pixels, half-open.

    Shape:
        x, partner, result [B, C, H, W].
    """
    y0, y1, x0, x1 = box
    mixed = x.clone()
    mixed[:, :, y0:y1, x0:x1] = partner[:, :, y0:y1, x0:x1]
    return mixed


def cutmix_box(height: int, width: int, lam: float, rng: np.random.Generator) -> tuple[Box, float]:
    """Draw a box of area share 1 - lam around a uniform centre and clip it at the border.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        lam: Share that should remain, in [0, 1].
        rng: Source of the centre.

    Returns:
        The box (y0, y1, x0, x1), and the share that does remain after clipping.
    """
    ratio = math.sqrt(1.0 - lam)
    half_h, half_w = int(height * ratio) // 2, int(width * ratio) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    y0, y1 = max(y - half_h, 0), min(y + half_h, height)
    x0, x1 = max(x - half_w, 0), min(x + half_w, width)
    return (y0, y1, x0, x1), 1.0 - (y1 - y0) * (x1 - x0) / (height * width)


@TRANSFORMS.register_module()
class BatchMixup:
    """Mixup or CutMix of a batch with itself in reversed order, with one lambda per batch.

    Source: DeiT recipe (arXiv:2012.12877, section 6); `Mixup` of timm 0.4.12 in its "batch" mode.

    Differs from official:
        The draws come from the run's keyed generator, so a resumed run repeats them; upstream they
        come from NumPy's global generator.

    Args:
        mixup_alpha: Parameter of Beta(a, a) for mixup; 0 switches mixup off.
        cutmix_alpha: The same for CutMix.
        prob: Probability to mix a batch at all.
        switch_prob: Probability of CutMix when both are on.
        label_smoothing: s in [0, 1); applied to all targets, mixed or not.
        scope: "process", as published: every process draws for itself and mixes its own rows.
            "global": one draw per step, partners from the reversed batch of all processes together,
            so that the result does not depend on how many processes share the batch (each sends its
            images to one other).

    Raises:
        ConfigError: An argument is out of its range.
        ValueError: The batch has an odd number of images, so that one would be mixed with itself.
    """

    def __init__(
        self,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        label_smoothing: float = 0.1,
        scope: str = "process",
    ) -> None:
        if min(mixup_alpha, cutmix_alpha) < 0:
            raise ConfigError(
                f"mixup_alpha={mixup_alpha}, cutmix_alpha={cutmix_alpha}: expected 0 (off) or more"
            )
        for name, value in (("prob", prob), ("switch_prob", switch_prob)):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name}={value} of BatchMixup must be in [0, 1]")
        if not 0.0 <= label_smoothing < 1.0:
            raise ConfigError(f"label_smoothing={label_smoothing} of BatchMixup must be in [0, 1)")
        if scope not in SCOPES:
            raise ConfigError(f"scope={scope!r} of BatchMixup; use one of {SCOPES}")
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.prob = prob
        self.switch_prob = switch_prob
        self.label_smoothing = label_smoothing
        self.scope = scope

    def __call__(self, inputs: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            inputs: Normalised images.
            labels: Class indices.
            num_classes: K.

        Shape:
            inputs [B, C, H, W], labels [B]; returns [B, C, H, W] and targets [B, K] float32.
        """
        targets = smoothed_targets(labels, num_classes, self.label_smoothing)
        use_cutmix, lam, rng = self._draw()
        if lam == 1.0:
            return inputs, targets
        across = self.scope == "global" and _world_size() > 1
        if (len(inputs) * (_world_size() if across else 1)) % 2:
            raise ValueError(
                f"a batch of {len(inputs)} images cannot be mixed with its reverse: the middle "
                "image would be mixed with itself. Use an even batch size and drop_last=True in "
                "train_dataloader"
            )
        partner = _reversed_across(inputs) if across else inputs.flip(0)
        partner_targets = _reversed_across(targets) if across else targets.flip(0)
        if use_cutmix:
            box, lam = cutmix_box(inputs.shape[-2], inputs.shape[-1], lam, rng)
            mixed = cutmix(inputs, partner, box)
        else:
            mixed = mixup(inputs, partner, lam)
        return mixed, mixup(targets, partner_targets, lam)

    def _draw(self) -> tuple[bool, float, np.random.Generator]:
        """Return whether to use CutMix, lambda (1 for no mixing), and the generator for the box."""
        rng = batch_random.numpy()
        if self.scope == "process":
            seeds = rng.integers(0, 1 << 62, size=_world_size())
            rng = np.random.default_rng(int(seeds[_rank()]))
        if not (self.mixup_alpha or self.cutmix_alpha) or rng.random() >= self.prob:
            return False, 1.0, rng
        use_cutmix = self.cutmix_alpha > 0
        if use_cutmix and self.mixup_alpha > 0:
            use_cutmix = rng.random() < self.switch_prob
        alpha = self.cutmix_alpha if use_cutmix else self.mixup_alpha
        return use_cutmix, float(rng.beta(alpha, alpha)), rng

    def __repr__(self) -> str:
        return (
            f"BatchMixup(mixup_alpha={self.mixup_alpha}, cutmix_alpha={self.cutmix_alpha}, "
            f"prob={self.prob}, switch_prob={self.switch_prob}, "
            f"label_smoothing={self.label_smoothing}, scope={self.scope!r})"
        )


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _reversed_across(x: Tensor) -> Tensor:
    """Return the partners of the local rows in the reversed global batch.

    Row j of process r is row j W + r of the global batch, so its partner is row B - 1 - j of
    process W - 1 - r: two processes exchange their rows, and the middle one keeps its own.
    """
    peer = _world_size() - 1 - _rank()
    if peer == _rank():
        return x.flip(0)
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    exchange = [
        dist.P2POp(dist.isend, x.contiguous(), peer),
        dist.P2POp(dist.irecv, received, peer),
    ]
    for work in dist.batch_isend_irecv(exchange):
        work.wait()
    return received.flip(0)
