"""PatchDrop stage 0 on CIFAR-100: the low-resolution classifier, 8 px, the released factory's network.

    python tools/train.py configs/patchdrop/cifar100_wide_classifier_lr.py

Hardware and hours: not run at this length; the published run used GPUs it does not name.
Expected: not measured. The paper's figures could not be checked and are not quoted.
"""

_base_ = ["../_base_/runtime.py", "./_base_/cifar100.py", "./_base_/classifier.py"]

model = dict(
    backbone=dict(_delete_=True, type="CIFARResNetBackbone"),
    head=dict(num_classes=100, in_channels=512),
)
data_preprocessor = dict(view=dict(type="LowResolutionViewPreprocessor", size=8))
