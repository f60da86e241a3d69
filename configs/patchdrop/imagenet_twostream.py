"""PatchDrop stage 3 on ImageNet-1k: with the logits of the low-resolution classifier.

    python tools/train.py configs/patchdrop/imagenet_twostream.py

Hardware and hours: not run at this length; the published run used GPUs it does not name.
Expected: not measured. The paper's figures could not be checked and are not quoted.
"""

_base_ = [
    "./_base_/large_policy.py",
    "./_base_/imagenet.py",
    "./_base_/policy_schedule.py",
]

model = dict(
    stage="twostream",
    classifier=dict(
        init_cfg=dict(
            type="Pretrained",
            checkpoint="work_dirs/patchdrop/imagenet_finetune/last.pth",
            prefix="classifier.",
        ),
    ),
    selector=dict(
        init_cfg=dict(
            type="Pretrained",
            checkpoint="work_dirs/patchdrop/imagenet_finetune/last.pth",
            prefix="selector.",
        ),
    ),
    lr_classifier=dict(
        type="PatchClassifier",
        backbone=dict(type="TorchvisionBackbone", model_name="resnet50", output="tokens"),
        head=dict(
            type="LinearHead",
            num_classes=1000,
            in_channels=2048,
            pool="mean",
            init="torch",
        ),
        init_cfg=dict(
            type="Pretrained", checkpoint="work_dirs/patchdrop/imagenet_classifier_lr/last.pth"
        ),
    ),
    policy_loss=dict(penalty=-20.0, reduction="patch_sum"),
)
