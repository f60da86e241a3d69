"""PatchDrop stage 3 on CIFAR-10: with the logits of the low-resolution classifier.

    python tools/train.py configs/patchdrop/cifar10_wide_twostream.py

Hardware and hours: not run at this length; the published run used GPUs it does not name.
Expected: not measured. The paper's figures could not be checked and are not quoted.
"""

_base_ = [
    "./_base_/wide_policy.py",
    "./_base_/cifar10.py",
    "./_base_/policy_schedule.py",
]

model = dict(
    stage="twostream",
    classifier=dict(
        init_cfg=dict(
            type="Pretrained",
            checkpoint="work_dirs/patchdrop/cifar10_wide_finetune/last.pth",
            prefix="classifier.",
        ),
    ),
    selector=dict(
        init_cfg=dict(
            type="Pretrained",
            checkpoint="work_dirs/patchdrop/cifar10_wide_finetune/last.pth",
            prefix="selector.",
        ),
    ),
    lr_classifier=dict(
        type="PatchClassifier",
        backbone=dict(type="CIFARResNetBackbone"),
        head=dict(
            type="LinearHead",
            num_classes=10,
            in_channels=512,
            pool="mean",
            init="torch",
        ),
        init_cfg=dict(
            type="Pretrained", checkpoint="work_dirs/patchdrop/cifar10_wide_classifier_lr/last.pth"
        ),
    ),
    policy_loss=dict(penalty=-10.0, reduction="patch_sum"),
)
