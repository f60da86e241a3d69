"""PatchDrop on CIFAR-10, short: one checkpoint over the trade-off, beside policies that do not look.

    python tools/test.py configs/patchdrop/cifar10_short_sweep.py

Hardware and hours: 2 CPU cores, 15 minutes.
Expected: 60.2 to 89.8 top-1 from 2 to 14 patches (one seed, docs/runs/patchdrop_cifar10).
"""

_base_ = [
    "./_base_/short_policy.py",
    "./_base_/cifar10.py",
    "./_base_/short_policy_schedule.py",
]

load_from = "work_dirs/patchdrop/cifar10_short_finetune/last.pth"
model = dict(stage="finetune")
train_cfg = None
train_dataloader = None
optim_wrapper = None
param_scheduler = None
test_cfg = dict(
    type="PatchDropSweepLoop",
    thresholds=(0.05, 0.2, 0.5, 0.8, 0.95),
    top_k=(2, 4, 6, 8, 10, 12, 14),
    baselines=("rows", "columns", "centre", "stochastic", "random"),
)
