"""PatchDrop stage 0 on CIFAR-10, short: the low-resolution classifier, ResNet-32 on 8 px.

    python tools/train.py configs/patchdrop/cifar10_short_classifier_lr.py

Hardware and hours: 2 CPU cores, 10 minutes.
Expected: 66.8 top-1 (one seed).
"""

_base_ = ["../_base_/runtime.py", "./_base_/cifar10.py", "./_base_/short_classifier.py"]

data_preprocessor = dict(view=dict(type="LowResolutionViewPreprocessor", size=8))
