"""PatchDrop with a bag of patches on CIFAR-10: 8 of 16 patches, policy and classifier.

    python tools/train.py configs/patchdrop/cifar10_bag_finetune.py

Hardware and hours: not run at this length.
Expected: not measured; its time falls with the patches (this folder's page).
"""

_base_ = [
    "./_base_/short_policy.py",
    "./_base_/cifar10.py",
    "./_base_/policy_schedule.py",
]

model = dict(
    stage="finetune",
    classifier=dict(
        type="PatchDropBagClassifier",
        init_cfg=dict(
            type="Pretrained", checkpoint="work_dirs/patchdrop/cifar10_bag_classifier/last.pth"
        ),
    ),
    policy_loss=dict(penalty=-10.0, reduction="patch_sum"),
)
custom_hooks = [
    dict(type="ProgressHook"),
    dict(type="PatchDropStatsHook"),
    dict(type="PatchDropBudgetHook", target=8.0),
]
