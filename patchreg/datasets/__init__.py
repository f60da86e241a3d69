"""Data sets and samplers: which images, and in which order."""

from patchreg.datasets import (  # noqa: F401
    cifar,
    fashion_mnist,
    image_files,
    inaturalist,
    keyed,
    quick_start,
    samplers,
)
