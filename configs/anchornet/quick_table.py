"""Stage 4 of quick.py: what every test image would answer after each view.

    python tools/test.py configs/anchornet/quick_table.py

Hardware and hours: 1 CPU core, 30 seconds.
Expected: 73.8, 75.7, 76.3, 76.3 top-1 after 1, 2, 3, 4 views (seed 0).
"""

_base_ = [
    "../_base_/runtime.py",
    "../_base_/datasets/cifar10_quick.py",
    "./_base_/quick_ensemble.py",
]

train_dataloader = None
val_dataloader = None
val_evaluator = None

model = dict(
    anchor=dict(
        init_cfg=dict(type="Pretrained", checkpoint="work_dirs/anchornet/quick_anchornet/last.pth")
    ),
    resized=dict(
        init_cfg=dict(type="Pretrained", checkpoint="work_dirs/anchornet/quick_resized/last.pth")
    ),
    patch=dict(
        init_cfg=dict(type="Pretrained", checkpoint="work_dirs/anchornet/quick_patch/last.pth")
    ),
)
test_cfg = dict(type="AnchorNetTableLoop", setup="quick_16_[0.3, 0.3]")
test_evaluator = [
    dict(type="AnchorNetTableMetric"),
    dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None),
    dict(type="CostMetric"),
]
