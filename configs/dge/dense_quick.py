"""Small plain DeiT on CIFAR-10: the dense twin of `quick.py`.

    python tools/train.py configs/dge/dense_quick.py

Hardware and hours: 2 CPU cores, 3 minutes.
Expected: 59.0 top-1 (mean of 3 seeds, docs/benchmarks.md).
"""

_base_ = [
    "./_base_.py",
    "../_base_/datasets/cifar10_quick.py",
    "../_base_/schedules/adamw_quick.py",
]

compare = dict(label="dense ViT", order=1)
model = dict(
    _delete_=True,
    type="PatchClassifier",
    backbone=dict(
        type="VisionTransformerBackbone",
        arch=dict(embed_dims=128, depth=4, num_heads=4),
        img_size=32,
        patch_size=4,
        mlp_ratio=2,
    ),
    head=dict(
        type="LinearHead",
        num_classes=10,
        in_channels=128,
        loss=dict(type="CrossEntropyLoss", label_smooth=0.1),
    ),
)
custom_hooks = [dict(type="ProgressHook")]
val_evaluator = [dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None), dict(type="CostMetric")]
test_evaluator = val_evaluator
