"""Small ViT pre-trained by PW-Self on CIFAR-10 for longer: each image its own views, containment matching.

    python tools/train.py configs/pwself/cifar10.py
    python tools/test.py configs/pwself/cifar10.py work_dirs/pwself/cifar10

Hardware and hours: one thread of 2 CPU cores, 35 minutes.
Expected: 50.9 k-NN top-1 (k = 20), pixels 45.7, untrained 29.4 (one seed, configs/pwself/README.md).
"""

_base_ = [
    "./_base_.py",
    "../_base_/evaluation/knn_cifar10.py",
    "../_base_/schedules/adamw_dino.py",
]

model = dict(
    backbone=dict(
        arch=dict(embed_dims=128, depth=4, num_heads=4),
        img_size=32,
        mlp_ratio=2,
        drop_path_rate=0.0,
    ),
    head=dict(in_channels=128, out_dim=1024, hidden_dim=256, bottleneck_dim=64),
    matching="containment",
    class_weight=0.8,
)
data_preprocessor = dict(type="MultiViewPreprocessor")
_views = [
    dict(num=2, size=32, scale=(0.4, 1.0)),
    dict(num=2, size=16, scale=(0.1, 0.4)),
]
_cut = dict(
    type="MultiView", source_size=32, photometry="device", geometry="per_image", views=_views
)
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(type="CIFAR10Dataset", data_root="data/cifar10", pipeline=[_cut]),
)
optim_wrapper = dict(dtype="bfloat16", optimizer=dict(lr=1.5e-3))
_schedule = dict(type="WarmupCosineParamScheduler", convert_to_iter_based=True)
param_scheduler = [dict(_schedule, param_name="lr", warmup=2, final=1e-5)]
auto_scale_lr = dict(enable=False)
custom_hooks = [dict(type="ProgressHook"), dict(type="PWSelfTeacherHook", momentum=0.99)]
train_cfg = dict(max_epochs=14)
