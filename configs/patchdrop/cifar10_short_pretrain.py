"""PatchDrop stage 1 on CIFAR-10, short: the policy against the frozen classifier.

    python tools/train.py configs/patchdrop/cifar10_short_pretrain.py

Hardware and hours: 2 CPU cores, 10 minutes.
Expected: 66.0 top-1 at 7.9 patches (one seed, docs/runs/patchdrop_cifar10).
"""

_base_ = [
    "./_base_/short_policy.py",
    "./_base_/cifar10.py",
    "./_base_/short_policy_schedule.py",
]

model = dict(
    classifier=dict(
        init_cfg=dict(
            type="Pretrained", checkpoint="work_dirs/patchdrop/cifar10_short_classifier_hr/last.pth"
        )
    ),
    policy_loss=dict(penalty=-0.5, reduction="patch_mean"),
)
param_scheduler = dict(T_max=3)
train_cfg = dict(max_epochs=3)
