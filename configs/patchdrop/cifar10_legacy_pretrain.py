"""PatchDrop stage 1 on CIFAR-10 as in the first public version: curriculum and its own reward.

    python tools/train.py configs/patchdrop/cifar10_legacy_pretrain.py

Hardware and hours: not run at this length; the published run used GPUs it does not name.
Expected: not measured. The paper's figures could not be checked and are not quoted.
"""

_base_ = [
    "./_base_/thin_policy.py",
    "./_base_/cifar10.py",
    "./_base_/policy_schedule.py",
]

model = dict(
    classifier=dict(
        init_cfg=dict(
            type="Pretrained", checkpoint="work_dirs/patchdrop/cifar10_classifier_hr/last.pth"
        ),
    ),
    selector=dict(value_outputs=16),
    policy_loss=dict(form="legacy", reduction="patch_mean"),
)
custom_hooks = [
    dict(type="ProgressHook"),
    dict(type="PatchDropStatsHook"),
    dict(type="PatchDropCurriculumHook"),
]
train_dataloader = dict(batch_size=512)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
