"""All stages of AnchorNet on CIFAR-10, small: localise, classify views, table, early exit.

    python tools/train.py configs/anchornet/quick.py

Hardware and hours: 1 CPU core, 9 minutes.
Expected: 76.6 top-1 at 31 MMACs per image, all four views of every image 76.3 at 65 (seed 0).
"""

_base_ = ["../_base_/runtime.py"]

stages = [
    "quick_anchornet.py",
    "quick_resized.py",
    "quick_patch.py",
    "quick_table.py",
    "quick_dynamic.py",
]
