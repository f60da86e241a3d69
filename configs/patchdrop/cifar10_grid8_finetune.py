"""PatchDrop on CIFAR-10 with a grid of 8 x 8 patches of 4 px, about a quarter of them.

    python tools/train.py configs/patchdrop/cifar10_grid8_finetune.py

Hardware and hours: not run at this length.
Expected: not measured; the paper has grids of 4 x 4 only.
"""

_base_ = [
    "./_base_/short_policy.py",
    "./_base_/cifar10.py",
    "./_base_/policy_schedule.py",
]

model = dict(
    stage="finetune",
    grid=(8, 8),
    classifier=dict(
        init_cfg=dict(
            type="Pretrained", checkpoint="work_dirs/patchdrop/cifar10_classifier_hr/last.pth"
        ),
    ),
    selector=dict(num_patches=64),
    policy_loss=dict(penalty=-10.0, reduction="patch_sum"),
)
custom_hooks = [
    dict(type="ProgressHook"),
    dict(type="PatchDropStatsHook"),
    dict(type="PatchDropBudgetHook", target=16.0),
]
