"""Transforms of one sample, and of one batch."""

from patchreg.transforms import batch_mixup, loading, rand_augment  # noqa: F401
