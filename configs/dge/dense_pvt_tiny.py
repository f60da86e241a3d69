"""Plain PVT-Tiny on ImageNet-1k at 256 px: the dense twin of `pvt_tiny.py`.

    tools/dist_train.sh configs/dge/dense_pvt_tiny.py 8

Hardware and hours: 8 GPUs x 128 images, 300 epochs; not run here yet.
Expected: the authors' repository has no numbers for it.
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
        type="PyramidVisionTransformerBackbone", arch="tiny", img_size=256, drop_path_rate=0.1
    ),
    head=dict(type="LinearHead", num_classes=1000, in_channels=512),
)
# As published, position embeddings of the pyramids decay.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(pos_embed=dict(decay_mult=1.0))))
val_evaluator = [dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None), dict(type="CostMetric")]
test_evaluator = val_evaluator
