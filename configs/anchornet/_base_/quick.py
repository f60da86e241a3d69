"""One cycle of SGD in bfloat16 on small images; evaluation at the end."""

optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
)
param_scheduler = dict(
    type="OneCycleLR", eta_max=0.2, total_steps=4, end=4, convert_to_iter_based=True
)
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=4)
val_cfg = dict()
test_cfg = dict()
