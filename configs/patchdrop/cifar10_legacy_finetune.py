"""PatchDrop stage 2 on CIFAR-10 as in the first public version: summed loss, fixed BatchNorm.

    python tools/train.py configs/patchdrop/cifar10_legacy_finetune.py

Hardware and hours: not run at this length; the published run used GPUs it does not name.
Expected: not measured. The paper's figures could not be checked and are not quoted.
"""

_base_ = [
    "./_base_/thin_policy.py",
    "./_base_/cifar10.py",
    "./_base_/policy_schedule.py",
]

model = dict(
    stage="finetune",
    classifier_mode="eval",
    classifier=dict(
        init_cfg=dict(
            type="Pretrained", checkpoint="work_dirs/patchdrop/cifar10_classifier_hr/last.pth"
        ),
    ),
    selector=dict(
        value_outputs=16,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="work_dirs/patchdrop/cifar10_legacy_pretrain/last.pth",
            prefix="selector.",
        ),
    ),
    policy_loss=dict(form="legacy", reduction="sum"),
)
