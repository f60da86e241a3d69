"""Fine-tuning of a downstream network: SGD, 30 epochs, cosine from 0.01 to 0, once per epoch.

The learning rate is for 256 images over all processes. Weight decay on all parameters.
"""

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=1e-4),
)
param_scheduler = dict(type="CosineAnnealingLR", T_max=30, eta_min=0.0, by_epoch=True)
auto_scale_lr = dict(enable=False, base_batch_size=256)
train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=1)
val_cfg = dict()
test_cfg = dict()
