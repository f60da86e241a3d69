"""PatchDrop stage 0 on CIFAR-10: the high-resolution classifier, the released factory's network.

    python tools/train.py configs/patchdrop/cifar10_wide_classifier_hr.py

Hardware and hours: not run at this length; the published run used GPUs it does not name.
Expected: not measured. The paper's figures could not be checked and are not quoted.
"""

_base_ = ["../_base_/runtime.py", "./_base_/cifar10.py", "./_base_/classifier.py"]

model = dict(
    backbone=dict(_delete_=True, type="CIFARResNetBackbone"),
    head=dict(in_channels=512),
)
