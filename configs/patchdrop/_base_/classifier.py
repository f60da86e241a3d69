"""Stage 0 on CIFAR: a classifier by SGD, 300 epochs, learning rate divided by 10 at 150 and 250."""

model = dict(
    type="PatchClassifier",
    backbone=dict(type="ThinCIFARResNetBackbone", depth=32),
    head=dict(type="LinearHead", num_classes=10, in_channels=64, pool="mean", init="torch"),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=5e-4),
)
param_scheduler = dict(type="MultiStepLR", milestones=[150, 250], gamma=0.1)
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=5)
val_cfg = dict()
test_cfg = dict()
val_evaluator = [dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None), dict(type="CostMetric")]
test_evaluator = val_evaluator
