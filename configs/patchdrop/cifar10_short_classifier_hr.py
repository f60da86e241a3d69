"""PatchDrop stage 0 on CIFAR-10, short: the high-resolution classifier, ResNet-32, one cycle.

    python tools/train.py configs/patchdrop/cifar10_short_classifier_hr.py

Hardware and hours: 2 CPU cores, about an hour.
Expected: at least 89 top-1.
"""

_base_ = ["../_base_/runtime.py", "./_base_/cifar10.py", "./_base_/short_classifier.py"]
