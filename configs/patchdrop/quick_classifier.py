"""Stage 0 of `quick.py`: the high-resolution classifier, ResNet-14.

    python tools/train.py configs/patchdrop/quick_classifier.py

Hardware and hours: 2 CPU cores, 3 minutes.
Expected: about 80 top-1.
"""

_base_ = ["../_base_/runtime.py", "../_base_/datasets/cifar10_quick.py"]

model = dict(
    type="PatchClassifier",
    backbone=dict(type="ThinCIFARResNetBackbone", depth=14),
    head=dict(type="LinearHead", num_classes=10, in_channels=64, pool="mean", init="torch"),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
)
param_scheduler = dict(
    type="OneCycleLR", eta_max=0.2, total_steps=4, end=4, convert_to_iter_based=True
)
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=2)
val_cfg = dict()
test_cfg = dict()
val_evaluator = [dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None), dict(type="CostMetric")]
test_evaluator = val_evaluator
