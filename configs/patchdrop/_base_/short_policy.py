"""Networks of the short runs on CIFAR: ResNet-32 classifies, ResNet-8 decides on 8 px.

Other than in the paper the policy reads the view at its own size, at a sixteenth of the cost, and
its last layer knows where in the image a feature is.
"""

_base_ = ["../../_base_/runtime.py"]

model = dict(
    type="PatchDropClassifier",
    classifier=dict(
        type="PatchClassifier",
        backbone=dict(type="ThinCIFARResNetBackbone", depth=32),
        head=dict(type="LinearHead", num_classes=10, in_channels=64, pool="mean", init="torch"),
    ),
    selector=dict(
        type="PatchDropSelector",
        backbone=dict(type="ThinCIFARResNetBackbone", depth=8),
        # 64 channels on a map of 2 x 2 cells.
        in_channels=256,
        pool="flatten",
    ),
    overview=dict(type="LowResolutionViewPreprocessor", size=8),
    policy_loss=dict(type="PatchDropPolicyLoss"),
)
custom_hooks = [
    dict(type="ProgressHook"),
    dict(type="PatchDropStatsHook"),
    dict(type="PatchDropBudgetHook", target=7.5),
]
