"""Plain DeiT-S on ImageNet-1k at 256 px: the dense twin of `deit_small.py`.

    tools/dist_train.sh configs/dge/dense_deit_small.py 8

Hardware and hours: 8 GPUs x 128 images, 300 epochs; not run here yet.
Expected: 80.6 top-1, 95.4 top-5 at 6.1 GMACs (authors' repository, DeiT-S).
"""

_base_ = [
    "./_base_.py",
    "../_base_/datasets/imagenet_deit_256.py",
    "../_base_/schedules/adamw_deit.py",
]

model = dict(
    _delete_=True,
    type="PatchClassifier",
    backbone=dict(
        type="VisionTransformerBackbone",
        arch="small",
        img_size=256,
        patch_size=16,
        drop_path_rate=0.1,
    ),
    head=dict(type="LinearHead", num_classes=1000, in_channels=384),
)
val_evaluator = [dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None), dict(type="CostMetric")]
test_evaluator = val_evaluator
