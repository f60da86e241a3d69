"""Four epochs of AdamW with a one-cycle learning rate in bfloat16, for the quick configurations."""

optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    constructor="GroupedOptimWrapperConstructor",
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
)
param_scheduler = dict(
    type="OneCycleLR", eta_max=2e-3, total_steps=4, end=4, convert_to_iter_based=True
)
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=1)
val_cfg = dict()
test_cfg = dict()
