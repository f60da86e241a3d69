"""AnchorNet's early exit on ImageNet-1k with DenseNet-201: static points and budgets, simulated on the table.

    python tools/test.py configs/anchornet/densenet201_dynamic.py

A table of the authors needs neither images nor weights: --cfg-options load_from=None
test_cfg.table=FILE.pth. With test_cfg.execute=True images really stop early, and time is measured.
Hardware and hours: CPU, seconds; with execute one GPU, minutes; not run here.
Expected: 0.7110, 0.7277, 0.7399, 0.7457 at 0.85, 1.0, 1.2, 1.5 G on the half not fitted on (authors' table).
"""

_base_ = ["../_base_/runtime.py", "./_base_/imagenet.py", "./_base_/densenet201_ensemble.py"]

train_dataloader = None
val_dataloader = None
val_evaluator = None
load_from = "work_dirs/anchornet/densenet201_table/ensemble.pth"
test_cfg = dict(
    type="AnchorNetDynamicLoop",
    table="work_dirs/anchornet/densenet201_table/table.safetensors",
    budgets=[0.85e9, 1.0e9, 1.2e9, 1.5e9],
    image_size=224,
)
