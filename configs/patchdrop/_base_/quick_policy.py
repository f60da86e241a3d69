"""Networks of the quick runs: ResNet-14 classifies, ResNet-8 decides on 8 px; data and reports."""

_base_ = ["../../_base_/runtime.py"]

model = dict(
    type="PatchDropClassifier",
    classifier=dict(
        type="PatchClassifier",
        backbone=dict(type="ThinCIFARResNetBackbone", depth=14),
        head=dict(type="LinearHead", num_classes=10, in_channels=64, pool="mean", init="torch"),
    ),
    selector=dict(
        type="PatchDropSelector",
        backbone=dict(type="ThinCIFARResNetBackbone", depth=8),
        in_channels=256,
        pool="flatten",
    ),
    overview=dict(type="LowResolutionViewPreprocessor", size=8),
    policy_loss=dict(type="PatchDropPolicyLoss"),
)
custom_hooks = [
    dict(type="ProgressHook"),
    dict(type="PatchDropStatsHook"),
    dict(type="PatchDropBudgetHook", target=6.0),
]
optim_wrapper = dict(type="AmpOptimWrapper", dtype="bfloat16", optimizer=dict(type="Adam", lr=2e-3))
param_scheduler = dict(type="CosineAnnealingLR", T_max=2, convert_to_iter_based=True)
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=1)
val_cfg = dict()
test_cfg = dict()
