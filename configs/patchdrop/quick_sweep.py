"""The end of `quick.py`: the policy beside policies that do not look, at the same patches.

    python tools/test.py configs/patchdrop/quick_sweep.py

Hardware and hours: 2 CPU cores, a minute.
Expected: the policy above rows, columns, stochastic and random.
"""

_base_ = ["./_base_/quick_policy.py", "../_base_/datasets/cifar10_quick.py"]

load_from = "work_dirs/patchdrop/quick_finetune/last.pth"
model = dict(stage="finetune")
train_cfg = None
train_dataloader = None
optim_wrapper = None
param_scheduler = None
test_cfg = dict(
    type="PatchDropSweepLoop",
    thresholds=(0.5,),
    baselines=("rows", "columns", "centre", "stochastic", "random"),
)
val_evaluator = [dict(type="PatchDropPolicyMetric"), dict(type="CostMetric")]
test_evaluator = val_evaluator
