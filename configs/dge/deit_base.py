"""DeiT-B with DGE on ImageNet-1k at 256 px, budget 0.5.

    tools/dist_train.sh configs/dge/deit_base.py 8

Hardware and hours: 8 GPUs x 128 images, 300 epochs; not run here yet.
Expected: the authors published no numbers for this size; static cost 23.1 GMACs.
"""

_base_ = [
    "./_base_.py",
    "../_base_/datasets/imagenet_deit_256.py",
    "../_base_/schedules/adamw_deit.py",
]

model = dict(backbone=dict(arch="base"), head=dict(in_channels=768))
param_scheduler = dict(warmup_epochs=20)
val_evaluator = [
    dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None),
    dict(type="CostMetric"),
    dict(type="DGEGranularityMetric", splits=[4, 2, 1]),
]
test_evaluator = val_evaluator
