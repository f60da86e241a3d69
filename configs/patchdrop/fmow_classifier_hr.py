"""PatchDrop stage 0 on fMoW: the high-resolution classifier, ResNet-34.

    python tools/train.py configs/patchdrop/fmow_classifier_hr.py

Hardware and hours: not run at this length; the published run used GPUs it does not name.
Expected: not measured. The paper's figures could not be checked and are not quoted.
"""

_base_ = ["../_base_/runtime.py", "./_base_/fmow.py", "./_base_/large_classifier.py"]

model = dict(
    backbone=dict(model_name="resnet34"),
    head=dict(num_classes=62, in_channels=512),
)
