"""Networks for 224 px: a ResNet classifies, ResNet-18 decides on the 56-px view."""

_base_ = ["../../_base_/runtime.py"]

model = dict(
    type="PatchDropClassifier",
    classifier=dict(
        type="PatchClassifier",
        backbone=dict(type="TorchvisionBackbone", model_name="resnet50", output="tokens"),
        head=dict(type="LinearHead", num_classes=1000, in_channels=2048, pool="mean", init="torch"),
    ),
    selector=dict(
        type="PatchDropSelector",
        backbone=dict(type="TorchvisionBackbone", model_name="resnet18", output="tokens"),
        in_channels=512,
    ),
    overview=dict(type="LowResolutionViewPreprocessor", size=56),
    policy_loss=dict(type="PatchDropPolicyLoss"),
)
custom_hooks = [dict(type="ProgressHook"), dict(type="PatchDropStatsHook")]
