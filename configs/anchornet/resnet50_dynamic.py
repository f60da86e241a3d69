"""AnchorNet's early exit on ImageNet-1k with ResNet-50: static points and budgets, simulated on the table.

    python tools/test.py configs/anchornet/resnet50_dynamic.py

A table of the authors needs neither images nor weights: --cfg-options load_from=None
test_cfg.table=FILE.pth. With test_cfg.execute=True images really stop early, and time is measured.
Hardware and hours: CPU, seconds; with execute one GPU, minutes; not run here.
Expected: not published.
"""

_base_ = ["../_base_/runtime.py", "./_base_/imagenet.py", "./_base_/resnet50_ensemble.py"]

train_dataloader = None
val_dataloader = None
val_evaluator = None
load_from = "work_dirs/anchornet/resnet50_table/ensemble.pth"
test_cfg = dict(
    type="AnchorNetDynamicLoop",
    table="work_dirs/anchornet/resnet50_table/table.safetensors",
    budgets=[0.85e9, 1.0e9, 1.2e9, 1.5e9],
    image_size=224,
)
