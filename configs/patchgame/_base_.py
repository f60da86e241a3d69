"""PatchGame: model, hooks and recipe that all trainings share, with the published settings.

Speaker: ResNet-9 ranks, ViT-Ti names the patches, 128 symbols; listener: ResNet-18 and a 12-layer text
encoder; both into 65,536 numbers. AdamW, 100 epochs, learning rate 1e-4 per 256 images after 30 epochs of
warm-up, weight decay 0.04 to 0.4, temperature of the symbols 5 to 1 over half of the epochs.
"""

_base_ = ["../_base_/runtime.py"]

model = dict(
    type="PatchGamePretrainer",
    backbone=dict(
        type="TorchvisionBackbone",
        model_name="resnet18",
        output="features",
        model_kwargs=dict(zero_init_residual=True),
    ),
    ranker=dict(type="PatchGameResNetBackbone", stride=32),
    selector=dict(type="RankSelector", norm="sort", count=49),
    # Position embeddings are made for 224 px whatever the images have, as in the authors' code.
    symbol=dict(
        type="VisionTransformerBackbone",
        arch="tiny",
        img_size=224,
        patch_size=32,
        drop_path_rate=0.1,
    ),
    loss=dict(type="ContrastiveLoss", gather="detached", bottleneck=True),
    head=dict(out_dim=65536, hidden_dim=2048, bottleneck_dim=256),
    img_size=224,
    patch_size=32,
)
custom_hooks = [
    dict(type="ProgressHook"),
    dict(type="FreezeLastLayerHook", epochs=1),
    dict(type="PatchGameTemperatureHook", start=5.0, final=1.0),
]
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.04),
    constructor="GroupedOptimWrapperConstructor",
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
)
param_scheduler = [
    dict(
        type="WarmupCosineParamScheduler",
        param_name="lr",
        warmup=30,
        final=1e-5,
        convert_to_iter_based=True,
    ),
    dict(
        type="WarmupCosineParamScheduler",
        param_name="weight_decay",
        final=0.4,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(enable=True, base_batch_size=256)
train_cfg = dict(by_epoch=True, max_epochs=100)
