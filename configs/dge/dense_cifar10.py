"""Plain DeiT trained on CIFAR-10 for longer: the dense twin of `cifar10.py`.

    python tools/train.py configs/dge/dense_cifar10.py

Hardware and hours: one thread of 2 CPU cores, 35 minutes.
Expected: 77.8 top-1 (one seed, docs/runs/dge_cifar10).
"""

_base_ = ["./dense_quick.py"]

model = dict(
    backbone=dict(arch=dict(embed_dims=120, depth=6, num_heads=4)),
    head=dict(in_channels=120),
)
param_scheduler = dict(total_steps=20, end=20)
train_cfg = dict(max_epochs=20, val_interval=2)
