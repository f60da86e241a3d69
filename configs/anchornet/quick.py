"""All stages of AnchorNet on CIFAR-10, small: localise, classify views, table, early exit.

    python tools/train.py configs/anchornet/quick.py

Hardware and hours: 2 CPU cores, 5 minutes.
Expected: 76.0 to 76.6 top-1 at 31 to 34 MMACs per image, all four views of every image 75.9 to 76.3
at 65 (seed 0; the sums of one and of two threads round differently).
"""

_base_ = ["../_base_/runtime.py"]

stages = [
    "quick_anchornet.py",
    "quick_resized.py",
    "quick_patch.py",
    "quick_table.py",
    "quick_dynamic.py",
]
