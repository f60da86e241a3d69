"""Paper-size networks for CIFAR: ResNet-32 classifies, ResNet-8 decides.

The policy sees the 8-px view enlarged to 32 px, as in the first public version.
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
        in_channels=64,
    ),
    overview=dict(type="LowResolutionViewPreprocessor", size=8, enlarge_to=32),
    policy_loss=dict(type="PatchDropPolicyLoss"),
)
custom_hooks = [dict(type="ProgressHook"), dict(type="PatchDropStatsHook")]
