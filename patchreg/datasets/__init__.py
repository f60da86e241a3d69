"""Data sets and samplers: which images, and in which order."""

from patchreg.datasets import (  # noqa: F401
    cifar,
    copydays,
    davis,
    fashion_mnist,
    fmow,
    image_files,
    image_list,
    imagenet_photos,
    inaturalist,
    keyed,
    photo_copies,
    quick_start,
    revisited,
    samplers,
)
