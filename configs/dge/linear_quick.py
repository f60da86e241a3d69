"""A linear classifier on the pixels of CIFAR-10: the floor that the quick models have to clear.

    python tools/train.py configs/dge/linear_quick.py

Hardware and hours: 2 CPU cores, about a minute.
Expected: 40.8 top-1 (one seed, docs/benchmarks.md).
"""

_base_ = ["../_base_/runtime.py", "../_base_/datasets/cifar10_quick.py"]

model = dict(
    type="PatchClassifier",
    backbone=dict(type="PixelBackbone"),
    head=dict(type="LinearHead", num_classes=10, in_channels=3072, pool="mean"),
)
train_dataloader = dict(dataset=dict(pipeline=[dict(type="mmpretrain.PackInputs")]))
optim_wrapper = dict(optimizer=dict(type="SGD", lr=1e-3, momentum=0.9, weight_decay=1e-3))
param_scheduler = dict(type="CosineAnnealingLR", T_max=10, convert_to_iter_based=True)
train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=10)
val_cfg = dict()
test_cfg = dict()
val_evaluator = [dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None), dict(type="CostMetric")]
test_evaluator = val_evaluator
