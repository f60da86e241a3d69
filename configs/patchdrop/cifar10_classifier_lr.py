"""PatchDrop stage 0 on CIFAR-10: the low-resolution classifier, ResNet-32 on every 4th pixel.

    python tools/train.py configs/patchdrop/cifar10_classifier_lr.py

Hardware and hours: one GPU, 300 epochs; not run at this length. `cifar10_short_classifier_lr.py` is
the schedule for a CPU.
Expected: not measured; the paper's figures are on this folder's page.
"""

_base_ = ["../_base_/runtime.py", "./_base_/cifar10.py", "./_base_/classifier.py"]

data_preprocessor = dict(view=dict(type="LowResolutionViewPreprocessor", size=8))
