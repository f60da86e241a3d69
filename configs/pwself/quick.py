"""Small ViT pre-trained by PW-Self on CIFAR-10 (the embedded cut of Fashion-MNIST without it).

    python tools/train.py configs/pwself/quick.py
    python tools/test.py configs/pwself/quick.py work_dirs/pwself/quick

Hardware and hours: 2 CPU cores, 5 minutes.
Expected: (to be measured)
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
        patch_size=4,
        mlp_ratio=2,
        drop_path_rate=0.0,
    ),
    head=dict(in_channels=128, out_dim=1024, hidden_dim=256, bottleneck_dim=64),
)
data_preprocessor = dict(type="MultiViewPreprocessor")
train_dataloader = dict(
    batch_size=128,
    num_workers=0,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="QuickStartDataset",
        data_root="data/cifar10",
        split="train",
        pipeline=[
            dict(
                type="MultiView",
                source_size=32,
                photometry="device",
                views=[
                    dict(num=2, size=32, scale=(0.4, 1.0), blur=0.0, solarize=0.0),
                    dict(num=4, size=16, scale=(0.1, 0.4), blur=0.0),
                ],
            )
        ],
    ),
)
optim_wrapper = dict(dtype="bfloat16", optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(
        type="WarmupCosineParamScheduler",
        param_name="lr",
        warmup=1,
        final=1e-5,
        convert_to_iter_based=True,
    )
]
auto_scale_lr = dict(enable=False)
train_cfg = dict(max_epochs=3)
