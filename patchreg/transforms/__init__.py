"""Transforms of one sample, and of one batch."""

from patchreg.transforms import batch_mixup, loading, multi_view, rand_augment, resize, timm_eval  # noqa: F401
