"""PatchDrop stage 2 on CIFAR-10, short: policy and classifier together, 7.5 patches.

    python tools/train.py configs/patchdrop/cifar10_short_finetune.py

Hardware and hours: 2 CPU cores, half an hour.
Expected: 85.7 top-1 at 7.2 patches (one seed, docs/runs/patchdrop_cifar10).
"""

_base_ = [
    "./_base_/short_policy.py",
    "./_base_/cifar10.py",
    "./_base_/short_policy_schedule.py",
]

model = dict(
    stage="finetune",
    classifier=dict(
        init_cfg=dict(
            type="Pretrained", checkpoint="work_dirs/patchdrop/cifar10_short_classifier_hr/last.pth"
        )
    ),
    selector=dict(
        init_cfg=dict(
            type="Pretrained",
            checkpoint="work_dirs/patchdrop/cifar10_short_pretrain/last.pth",
            prefix="selector.",
        )
    ),
    policy_loss=dict(penalty=-10.0, reduction="patch_sum"),
)
param_scheduler = dict(T_max=8)
train_cfg = dict(max_epochs=8)
