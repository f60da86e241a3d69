"""PatchDrop stage 3 on CIFAR-100: with the logits of the low-resolution classifier.

    python tools/train.py configs/patchdrop/cifar100_wide_twostream.py

Hardware and hours: not run at this length; the published run used GPUs it does not name.
Expected: not measured. The paper's figures could not be checked and are not quoted.
"""

_base_ = [
    "./_base_/wide_policy.py",
    "./_base_/cifar100.py",
    "./_base_/policy_schedule.py",
]

model = dict(
    stage="twostream",
    classifier=dict(
        head=dict(num_classes=100),
        init_cfg=dict(
            type="Pretrained",
            checkpoint="work_dirs/patchdrop/cifar100_wide_finetune/last.pth",
            prefix="classifier.",
        ),
    ),
    selector=dict(
        init_cfg=dict(
            type="Pretrained",
            checkpoint="work_dirs/patchdrop/cifar100_wide_finetune/last.pth",
            prefix="selector.",
        ),
    ),
    lr_classifier=dict(
        type="PatchClassifier",
        backbone=dict(type="CIFARResNetBackbone"),
        head=dict(
            type="LinearHead",
            num_classes=100,
            in_channels=512,
            pool="mean",
            init="torch",
        ),
        init_cfg=dict(
            type="Pretrained", checkpoint="work_dirs/patchdrop/cifar100_wide_classifier_lr/last.pth"
        ),
    ),
    policy_loss=dict(penalty=-10.0, reduction="patch_sum"),
)
