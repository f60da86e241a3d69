"""PatchDrop stage 1 on CIFAR-10: the policy against the frozen classifier.

    python tools/train.py configs/patchdrop/cifar10_wide_pretrain.py

Hardware and hours: not run at this length; the published run used GPUs it does not name.
Expected: not measured. The paper's figures could not be checked and are not quoted.
"""

_base_ = [
    "./_base_/wide_policy.py",
    "./_base_/cifar10.py",
    "./_base_/policy_schedule.py",
]

model = dict(
    classifier=dict(
        init_cfg=dict(
            type="Pretrained", checkpoint="work_dirs/patchdrop/cifar10_wide_classifier_hr/last.pth"
        ),
    ),
    policy_loss=dict(penalty=-0.5, reduction="patch_mean"),
)
train_dataloader = dict(batch_size=1024)
