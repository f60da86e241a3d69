"""PatchDrop stage 0 on CIFAR-100: the high-resolution classifier, ResNet-32.

    python tools/train.py configs/patchdrop/cifar100_classifier_hr.py

Hardware and hours: not run at this length; the published run used GPUs it does not name.
Expected: not measured. The paper's figures could not be checked and are not quoted.
"""

_base_ = ["../_base_/runtime.py", "./_base_/cifar100.py", "./_base_/classifier.py"]

model = dict(
    head=dict(num_classes=100),
)
