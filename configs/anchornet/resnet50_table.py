"""AnchorNet's confidence table on ImageNet-1k: ResNet-50, the shrunk image and four windows.

    python tools/test.py configs/anchornet/resnet50_table.py

It takes the newest checkpoints of stages 1 to 3 and writes, beside the table, ensemble.pth with all of them.
Hardware and hours: one GPU, minutes; not run here.
Expected: not published.
"""

_base_ = ["../_base_/runtime.py", "./_base_/imagenet.py", "./_base_/resnet50_ensemble.py"]

train_dataloader = None
val_dataloader = None
val_evaluator = None
model = dict(
    anchor=dict(
        init_cfg=dict(type="Pretrained", checkpoint="work_dirs/anchornet/anchornet/last.pth")
    ),
    resized=dict(
        init_cfg=dict(type="Pretrained", checkpoint="work_dirs/anchornet/resnet50_resized/last.pth")
    ),
    patch=dict(
        init_cfg=dict(type="Pretrained", checkpoint="work_dirs/anchornet/resnet50_patch/last.pth")
    ),
)
test_cfg = dict(type="AnchorNetTableLoop", setup="resnet50_95_[0.3, 0.3, 0.3, 0.3]")
test_evaluator = [
    dict(type="AnchorNetTableMetric", keep_logits=False),
    dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None),
    dict(type="CostMetric"),
]
