"""DeiT's recipe: AdamW, 300 epochs, cosine with warm-up, learning rate 5e-4 per 512 images.

The learning rate below is for 512 images over all processes and is scaled to the batch in use (1e-3
at 1024). No weight decay on one-dimensional parameters, class token and position embedding; a
distillation token decays.
"""

optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=5e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    constructor="GroupedOptimWrapperConstructor",
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={"cls_token": dict(decay_mult=0.0), "pos_embed": dict(decay_mult=0.0)},
    ),
)
param_scheduler = dict(
    type="DeiTCosineLR", T_max=300, warmup_epochs=5, warmup_lr=1e-6, eta_min=1e-5
)
auto_scale_lr = dict(enable=True, base_batch_size=512)
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()
