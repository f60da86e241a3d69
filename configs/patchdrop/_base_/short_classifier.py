"""Stage 0 for a CPU: one cycle of SGD in bfloat16."""

model = dict(
    type="PatchClassifier",
    backbone=dict(type="ThinCIFARResNetBackbone", depth=32),
    head=dict(type="LinearHead", num_classes=10, in_channels=64, pool="mean", init="torch"),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
)
param_scheduler = dict(
    type="OneCycleLR", eta_max=0.2, total_steps=20, end=20, convert_to_iter_based=True
)
train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=2)
val_cfg = dict()
test_cfg = dict()
val_evaluator = [dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None), dict(type="CostMetric")]
test_evaluator = val_evaluator
