"""PVT-Small with DGE on ImageNet-1k at 256 px, budget 0.5.

    tools/dist_train.sh configs/dge/pvt_small.py 8

Hardware and hours: 8 GPUs x 128 images, 300 epochs; not run here yet.
Expected: the authors' repository has no numbers for it; static cost 4.8 GMACs, counted their way.
"""

_base_ = [
    "./_base_.py",
    "../_base_/datasets/imagenet_deit_256.py",
    "../_base_/schedules/adamw_deit.py",
]

model = dict(
    backbone=dict(
        _delete_=True,
        type="DGEPyramidVisionTransformerBackbone",
        arch="small",
        img_size=256,
        splits=[4, 2, 1],
        drop_path_rate=0.1,
        drop_path_mode="query",
    ),
    head=dict(in_channels=512),
)
# As published, position embeddings of the pyramids decay.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(pos_embed=dict(decay_mult=1.0))))
param_scheduler = dict(warmup_epochs=20)
val_evaluator = [
    dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None),
    dict(type="CostMetric"),
    dict(type="DGEGranularityMetric", splits=[4, 2, 1]),
]
test_evaluator = val_evaluator
