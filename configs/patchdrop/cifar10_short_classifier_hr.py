"""PatchDrop stage 0 on CIFAR-10, short: the high-resolution classifier, ResNet-32, one cycle.

    python tools/train.py configs/patchdrop/cifar10_short_classifier_hr.py

Hardware and hours: 2 CPU cores, about an hour.
Expected: 90.8 top-1 (one seed, docs/runs/patchdrop_cifar10).
"""

_base_ = ["../_base_/runtime.py", "./_base_/cifar10.py", "./_base_/short_classifier.py"]
