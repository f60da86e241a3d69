"""Stage 2 of `quick.py`: policy and classifier together, 6 of 16 patches.

    python tools/train.py configs/patchdrop/quick_finetune.py

Hardware and hours: 2 CPU cores, 3 minutes.
Expected: more right than random patches of the same number.
"""

_base_ = ["./_base_/quick_policy.py", "../_base_/datasets/cifar10_quick.py"]

compare = dict(label="PatchDrop", knob="model.selector.top_k", values=(4, 6, 8, 10, 14), order=4)
model = dict(
    stage="finetune",
    classifier=dict(
        init_cfg=dict(type="Pretrained", checkpoint="work_dirs/patchdrop/quick_classifier/last.pth")
    ),
    selector=dict(
        init_cfg=dict(
            type="Pretrained",
            checkpoint="work_dirs/patchdrop/quick_pretrain/last.pth",
            prefix="selector.",
        )
    ),
    policy_loss=dict(penalty=-5.0, reduction="patch_sum"),
)
val_evaluator = [dict(type="PatchDropPolicyMetric"), dict(type="CostMetric")]
test_evaluator = val_evaluator
