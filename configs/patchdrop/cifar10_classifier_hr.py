"""PatchDrop stage 0 on CIFAR-10: the high-resolution classifier, ResNet-32.

    python tools/train.py configs/patchdrop/cifar10_classifier_hr.py

Hardware and hours: one GPU, 300 epochs; not run at this length. `cifar10_short_classifier_hr.py` is
the schedule for a CPU.
Expected: not measured; the paper's figures are on this folder's page.
"""

_base_ = ["../_base_/runtime.py", "./_base_/cifar10.py", "./_base_/classifier.py"]
