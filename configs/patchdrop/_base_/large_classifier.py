"""Stage 0 at 224 px: Adam at a constant learning rate."""

model = dict(
    type="PatchClassifier",
    backbone=dict(type="TorchvisionBackbone", model_name="resnet50", output="tokens"),
    head=dict(type="LinearHead", num_classes=1000, in_channels=2048, pool="mean", init="torch"),
)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=1e-3))
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=5)
val_cfg = dict()
test_cfg = dict()
val_evaluator = [dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None), dict(type="CostMetric")]
test_evaluator = val_evaluator
