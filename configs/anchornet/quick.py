"""All stages of AnchorNet on CIFAR-10, small: localise, classify views, table, early exit.

    python tools/train.py configs/anchornet/quick.py

Hardware and hours: 1 CPU core, 10 minutes.
Expected: to be measured.
"""

_base_ = ["../_base_/runtime.py"]

stages = [
    "quick_anchornet.py",
    "quick_resized.py",
    "quick_patch.py",
    "quick_table.py",
    "quick_dynamic.py",
]
