"""Linear probe on CIFAR-10 of the frozen backbone of a small PW-Self run.

    python tools/train.py configs/pwself/linear_cifar10.py --cfg-options load_from=CHECKPOINT

Hardware and hours: 2 CPU cores, about 10 minutes.
Expected: 45.5 top-1 for cifar10.py, with model.backbone.arch.depth=4 (one seed, README.md).
"""

_base_ = [
    "../_base_/runtime.py",
    "../_base_/datasets/cifar10_quick.py",
]

model = dict(
    type="LinearProbeClassifier",
    backbone=dict(
        type="VisionTransformerBackbone",
        arch=dict(embed_dims=128, depth=3, num_heads=4),
        img_size=32,
        patch_size=8,
        mlp_ratio=2,
        pos_resize="dino",
    ),
    head=dict(type="LinearProbeHead", num_classes=10, in_channels=128, n_last_blocks=3),
    checkpoint_key="teacher",
)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.0))
param_scheduler = dict(type="CosineAnnealingLR", T_max=10, eta_min=0.0)
auto_scale_lr = dict(enable=False, base_batch_size=256)
train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=5)
default_hooks = dict(checkpoint=dict(save_best="accuracy/top1"))
val_cfg = dict()
test_cfg = dict()
