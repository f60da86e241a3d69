"""Stage 1 of `quick.py`: the policy against the frozen classifier.

    python tools/train.py configs/patchdrop/quick_pretrain.py

Hardware and hours: 2 CPU cores, a minute.
Expected: more right than random patches of the same number.
"""

_base_ = ["./_base_/quick_policy.py", "../_base_/datasets/cifar10_quick.py"]

model = dict(
    classifier=dict(
        init_cfg=dict(type="Pretrained", checkpoint="work_dirs/patchdrop/quick_classifier/last.pth")
    ),
    policy_loss=dict(penalty=-0.5, reduction="patch_mean"),
)
param_scheduler = dict(T_max=1)
train_cfg = dict(max_epochs=1)
val_evaluator = [dict(type="PatchDropPolicyMetric"), dict(type="CostMetric")]
test_evaluator = val_evaluator
