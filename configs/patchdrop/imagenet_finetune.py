"""PatchDrop stage 2 on ImageNet-1k: policy and classifier together.

    python tools/train.py configs/patchdrop/imagenet_finetune.py

Hardware and hours: not run at this length; the published run used GPUs it does not name.
Expected: not measured. The paper's figures could not be checked and are not quoted.
"""

_base_ = [
    "./_base_/large_policy.py",
    "./_base_/imagenet.py",
    "./_base_/policy_schedule.py",
]

model = dict(
    stage="finetune",
    classifier=dict(
        init_cfg=dict(
            type="Pretrained", checkpoint="work_dirs/patchdrop/imagenet_classifier_hr/last.pth"
        ),
    ),
    selector=dict(
        init_cfg=dict(
            type="Pretrained",
            checkpoint="work_dirs/patchdrop/imagenet_pretrain/last.pth",
            prefix="selector.",
        ),
    ),
    policy_loss=dict(penalty=-20.0, reduction="patch_sum"),
)
