"""Plain DeiT trained on CIFAR-10 for longer: the dense twin of `cifar10.py`.

    python tools/train.py configs/dge/dense_cifar10.py

Hardware and hours: one thread of 2 CPU cores, 35 minutes.
Expected: 77.8 top-1 (one seed, docs/runs/dge_cifar10).
"""

_base_ = [
    "./_base_.py",
    "../_base_/datasets/cifar10_quick.py",
    "../_base_/schedules/adamw_quick.py",
]

model = dict(
    _delete_=True,
    type="PatchClassifier",
    backbone=dict(
        type="VisionTransformerBackbone",
        arch=dict(embed_dims=120, depth=6, num_heads=4),
        img_size=32,
        patch_size=4,
        mlp_ratio=2,
    ),
    head=dict(
        type="LinearHead",
        num_classes=10,
        in_channels=120,
        loss=dict(type="CrossEntropyLoss", label_smooth=0.1),
    ),
)
param_scheduler = dict(total_steps=20, end=20)
train_cfg = dict(max_epochs=20, val_interval=2)
custom_hooks = [dict(type="ProgressHook")]
val_evaluator = [dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None), dict(type="CostMetric")]
test_evaluator = val_evaluator
