"""PatchDrop stage 3 on CIFAR-10, short: with the low-resolution classifier's logits.

    python tools/train.py configs/patchdrop/cifar10_short_twostream.py

Hardware and hours: 2 CPU cores, 10 minutes.
Expected: 86.3 top-1 at 7.3 patches (one seed, docs/runs/patchdrop_cifar10).
"""

_base_ = [
    "./_base_/short_policy.py",
    "./_base_/cifar10.py",
    "./_base_/short_policy_schedule.py",
]

model = dict(
    stage="twostream",
    classifier=dict(
        init_cfg=dict(
            type="Pretrained",
            checkpoint="work_dirs/patchdrop/cifar10_short_finetune/last.pth",
            prefix="classifier.",
        )
    ),
    selector=dict(
        init_cfg=dict(
            type="Pretrained",
            checkpoint="work_dirs/patchdrop/cifar10_short_finetune/last.pth",
            prefix="selector.",
        )
    ),
    lr_classifier=dict(
        type="PatchClassifier",
        backbone=dict(type="ThinCIFARResNetBackbone", depth=32),
        head=dict(type="LinearHead", num_classes=10, in_channels=64, pool="mean", init="torch"),
        init_cfg=dict(
            type="Pretrained", checkpoint="work_dirs/patchdrop/cifar10_short_classifier_lr/last.pth"
        ),
    ),
    policy_loss=dict(penalty=-10.0, reduction="patch_sum"),
)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
param_scheduler = dict(T_max=2)
train_cfg = dict(max_epochs=2)
