"""Plain DeiT-B on ImageNet-1k at 256 px: the dense twin of `deit_base.py`.

    tools/dist_train.sh configs/dge/dense_deit_base.py 8

Hardware and hours: 8 GPUs x 128 images, 300 epochs; not run here yet.
Expected: the authors published no numbers for this size; static cost 23.1 GMACs.
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
        arch="base",
        img_size=256,
        patch_size=16,
        drop_path_rate=0.1,
    ),
    head=dict(type="LinearHead", num_classes=1000, in_channels=768),
)
val_evaluator = [dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None), dict(type="CostMetric")]
test_evaluator = val_evaluator
