"""DINO's recipe: AdamW, 100 epochs, learning rate 5e-4 per 256 images, weight decay 0.04 to 0.4.

Both follow a cosine over all iterations, the learning rate after 10 epochs of warm-up from 0. Biases
and norms do not decay; class token and position embedding do. Gradients are clipped tensor by tensor.
"""

optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=5e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.04),
    clip_grad=dict(type="per_tensor", max_norm=3.0),
    constructor="GroupedOptimWrapperConstructor",
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
)
param_scheduler = [
    dict(
        type="WarmupCosineParamScheduler",
        param_name="lr",
        warmup=10,
        final=1e-6,
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
