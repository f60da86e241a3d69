"""Small PatchGame on CIFAR-10 (the embedded cut of Fashion-MNIST where it was not prepared), patches of 4 px.

    python tools/train.py configs/patchgame/quick.py

Hardware and hours: one thread of 2 CPU cores, 6 minutes.
Expected: matching 9.5 top-1 (chance 0.78), k-NN of the tower 34.2 (untrained 29.5), mean of 3 seeds.
"""

_base_ = ["./_base_.py", "../_base_/datasets/cifar10_two_views.py"]

_vit = dict(
    _delete_=True,
    type="VisionTransformerBackbone",
    arch=dict(embed_dims=64, depth=2, num_heads=2),
    img_size=32,
    patch_size=4,
    mlp_ratio=2,
)
model = dict(
    backbone=dict(_vit, arch=dict(embed_dims=96, depth=3, num_heads=3)),
    ranker=dict(_vit, arch=dict(embed_dims=64, depth=1, num_heads=2)),
    symbol=_vit,
    selector=dict(count=64),
    head=dict(out_dim=1024, hidden_dim=256, bottleneck_dim=64),
    img_size=32,
    patch_size=4,
    hidden_dim=64,
    text_dims=64,
    text_heads=2,
    text_layers=2,
)
val_evaluator = dict(type="PatchGameMatchMetric")
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=1e-3))
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
train_cfg = dict(max_epochs=3, val_interval=3)
val_cfg = dict()
test_cfg = dict()
