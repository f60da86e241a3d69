"""Networks of the released factory for CIFAR: blocks 3, 4, 6, 3 classify, 1, 1, 1, 1 decide."""

_base_ = ["../../_base_/runtime.py"]

model = dict(
    type="PatchDropClassifier",
    classifier=dict(
        type="PatchClassifier",
        backbone=dict(type="CIFARResNetBackbone"),
        head=dict(type="LinearHead", num_classes=10, in_channels=512, pool="mean", init="torch"),
    ),
    selector=dict(
        type="PatchDropSelector",
        backbone=dict(type="CIFARResNetBackbone", num_blocks=(1, 1, 1, 1)),
        in_channels=512,
    ),
    overview=dict(type="LowResolutionViewPreprocessor", size=8),
    policy_loss=dict(type="PatchDropPolicyLoss"),
)
custom_hooks = [dict(type="ProgressHook"), dict(type="PatchDropStatsHook")]
