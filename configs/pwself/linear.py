"""Linear probe on ImageNet-1k, or any class folders, of a frozen ViT-S/16: `eval_linear.py`.

    tools/dist_train.sh configs/pwself/linear.py 8 --cfg-options load_from=CHECKPOINT
    python tools/test.py configs/pwself/linear.py work_dirs/pwself/linear

Class tokens of the last 4 blocks. A public classifier is tested with the backbone that it belongs to:
tools/test.py configs/pwself/linear.py dino_vits16 --cfg-options model.head.checkpoint=FILE

Hardware and hours: 8 GPUs, about a day for ImageNet-1k; not run here (no ImageNet).
Expected: 77.0 top-1 for DINO's dino_vits16 (its README).
"""

_base_ = ["../_base_/runtime.py", "../_base_/evaluation/imagenet_224.py"]

model = dict(
    type="LinearProbeClassifier",
    backbone=dict(type="VisionTransformerBackbone", arch="small", patch_size=16, pos_resize="dino"),
    head=dict(type="LinearProbeHead", num_classes=1000, in_channels=384, n_last_blocks=4),
    checkpoint_key="teacher",
)
_crop = dict(
    type="mmpretrain.RandomResizedCrop", scale=224, interpolation="bilinear", backend="pillow"
)
_flip = dict(type="mmpretrain.RandomFlip", prob=0.5, direction="horizontal")
_pipeline = [dict(type="LoadImage"), _crop, _flip, dict(type="mmpretrain.PackInputs")]
train_dataloader = dict(
    _base_.test_dataloader,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="ImageFolderDataset", data_root="data/imagenet", split="train", pipeline=_pipeline
    ),
)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.001, momentum=0.9, weight_decay=0.0))
param_scheduler = dict(type="CosineAnnealingLR", T_max=100, eta_min=0.0)
auto_scale_lr = dict(enable=True, base_batch_size=256)
train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=1)
val_dataloader = _base_.test_dataloader
default_hooks = dict(checkpoint=dict(save_best="accuracy/top1"))
val_cfg = dict()
test_cfg = dict()
val_evaluator = dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None)
test_evaluator = val_evaluator
