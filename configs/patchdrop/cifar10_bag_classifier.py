"""A classifier that computes kept patches only: bag of patches on CIFAR-10, stage 0.

    python tools/train.py configs/patchdrop/cifar10_bag_classifier.py

Hardware and hours: not run at this length.
Expected: not measured; its time falls with the patches (this folder's page).
"""

_base_ = ["../_base_/runtime.py", "./_base_/cifar10.py", "./_base_/classifier.py"]

model = dict(
    type="PatchDropBagClassifier",
    backbone=dict(depth=32),
    head=dict(num_classes=10),
    train_keep=(4, 16),
)
