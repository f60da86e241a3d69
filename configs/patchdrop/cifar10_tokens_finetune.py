"""PatchDrop with a patch-token transformer on CIFAR-10: 8 of 16 patches, policy and classifier.

    python tools/train.py configs/patchdrop/cifar10_tokens_finetune.py

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
        _delete_=True,
        type="PatchDropTokenClassifier",
        backbone=dict(
            type="VisionTransformerBackbone",
            arch=dict(embed_dims=192, depth=6, num_heads=3),
            img_size=32,
            patch_size=4,
            mlp_ratio=2,
        ),
        head=dict(type="LinearHead", num_classes=10, in_channels=192),
        init_cfg=dict(
            type="Pretrained",
            checkpoint="work_dirs/patchdrop/cifar10_tokens_classifier/last.pth",
        ),
    ),
    policy_loss=dict(penalty=-10.0, reduction="patch_sum"),
)
custom_hooks = [
    dict(type="ProgressHook"),
    dict(type="PatchDropStatsHook"),
    dict(type="PatchDropBudgetHook", target=8.0),
]
