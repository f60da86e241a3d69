"""Stage 5 of quick.py: thresholds for three budgets, then early exit for real with each of them.

    python tools/test.py configs/anchornet/quick_dynamic.py

Hardware and hours: 1 CPU core, 30 seconds.
Expected: 75.9, 76.4, 76.6 top-1 for the three budgets, no decision unlike the table (seed 0).
"""

_base_ = [
    "../_base_/runtime.py",
    "../_base_/datasets/cifar10_quick.py",
    "./_base_/quick_ensemble.py",
]

compare = dict(label="AnchorNet", knob="budget", values=(22e6, 28e6, 34e6, 38e6), order=5)
train_dataloader = None
val_dataloader = None
val_evaluator = None

load_from = "work_dirs/anchornet/quick_table/ensemble.pth"
test_cfg = dict(
    type="AnchorNetDynamicLoop",
    table="work_dirs/anchornet/quick_table/table.safetensors",
    image_size=32,
    budgets=[22e6, 28e6, 38e6],
    execute=True,
)
