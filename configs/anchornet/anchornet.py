"""AnchorNet stage 1 on ImageNet-1k: the localiser, 0.67 M parameters, 60.5 M multiply-accumulates.

    tools/dist_train.sh configs/anchornet/anchornet.py 8

Hardware and hours: 8 GPUs x 32 images, 100 epochs; not run here.
Expected: not published (the authors' repository gives a checkpoint without a figure).
"""

_base_ = ["../_base_/runtime.py", "./_base_/imagenet.py"]

model = dict(
    type="AnchorNetClassifier",
    backbone=dict(type="AnchorNetBackbone"),
    head=dict(type="AnchorNetCAMHead", num_classes=1000),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True),
)
param_scheduler = dict(type="MultiStepLR", milestones=[30, 60, 90], gamma=0.1)
auto_scale_lr = dict(enable=False, base_batch_size=256)
train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(checkpoint=dict(save_best="accuracy/top1"))
