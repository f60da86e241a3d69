"""PatchDrop stage 3 on fMoW: with the logits of the low-resolution classifier.

    python tools/train.py configs/patchdrop/fmow_twostream.py

Hardware and hours: not run at this length; the published run used GPUs it does not name.
Expected: not measured. The paper's figures could not be checked and are not quoted.
"""

_base_ = [
    "./_base_/large_policy.py",
    "./_base_/fmow.py",
    "./_base_/policy_schedule.py",
]

model = dict(
    stage="twostream",
    classifier=dict(
        backbone=dict(model_name="resnet34"),
        head=dict(num_classes=62, in_channels=512),
        init_cfg=dict(
            type="Pretrained",
            checkpoint="work_dirs/patchdrop/fmow_finetune/last.pth",
            prefix="classifier.",
        ),
    ),
    selector=dict(
        init_cfg=dict(
            type="Pretrained",
            checkpoint="work_dirs/patchdrop/fmow_finetune/last.pth",
            prefix="selector.",
        ),
    ),
    lr_classifier=dict(
        type="PatchClassifier",
        backbone=dict(type="TorchvisionBackbone", model_name="resnet34", output="tokens"),
        head=dict(
            type="LinearHead",
            num_classes=62,
            in_channels=512,
            pool="mean",
            init="torch",
        ),
        init_cfg=dict(
            type="Pretrained", checkpoint="work_dirs/patchdrop/fmow_classifier_lr/last.pth"
        ),
    ),
    policy_loss=dict(penalty=-20.0, reduction="patch_sum"),
)
