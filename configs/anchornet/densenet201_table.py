"""AnchorNet's confidence table on ImageNet-1k: DenseNet-201, the shrunk image and four windows.

    python tools/test.py configs/anchornet/densenet201_table.py

It takes the newest checkpoints of stages 1 to 3 and writes, beside the table, ensemble.pth with all of them.
Hardware and hours: one GPU, minutes; not run here.
Expected: 70.38, 73.65, 74.53, 74.71, 74.87 top-1 after 1 to 5 views (authors' table).
"""

_base_ = ["../_base_/runtime.py", "./_base_/imagenet.py", "./_base_/densenet201_ensemble.py"]

train_dataloader = None
val_dataloader = None
val_evaluator = None
model = dict(
    anchor=dict(
        init_cfg=dict(type="Pretrained", checkpoint="work_dirs/anchornet/anchornet/last.pth")
    ),
    resized=dict(
        init_cfg=dict(
            type="Pretrained", checkpoint="work_dirs/anchornet/densenet201_resized/last.pth"
        )
    ),
    patch=dict(
        init_cfg=dict(
            type="Pretrained", checkpoint="work_dirs/anchornet/densenet201_patch/last.pth"
        )
    ),
)
test_cfg = dict(type="AnchorNetTableLoop", setup="densenet201_95_[0.3, 0.3, 0.3, 0.3]")
test_evaluator = [
    dict(type="AnchorNetTableMetric", keep_logits=False),
    dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None),
    dict(type="CostMetric"),
]
