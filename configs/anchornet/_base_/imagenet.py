"""ImageNet-1k at 224 px as AnchorNet reads it: 256 images per step, 32 on each of 8 processes."""

_data_root = "data/imagenet"

_train_pipeline = [
    dict(type="LoadImage"),
    dict(
        type="mmpretrain.RandomResizedCrop",
        scale=224,
        crop_ratio_range=(0.08, 1.0),
        aspect_ratio_range=(3.0 / 4.0, 4.0 / 3.0),
        interpolation="bilinear",
        backend="pillow",
    ),
    dict(type="mmpretrain.RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="mmpretrain.PackInputs"),
]
_val_pipeline = [
    dict(type="LoadImage"),
    dict(
        type="mmpretrain.ResizeEdge",
        scale=256,
        edge="short",
        interpolation="bilinear",
        backend="pillow",
    ),
    dict(type="mmpretrain.CenterCrop", crop_size=224),
    dict(type="mmpretrain.PackInputs"),
]

train_dataloader = dict(
    batch_size=32,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageNetDataset", data_root=_data_root, split="train", pipeline=_train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=256,
    num_workers=16,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageNetDataset",
        data_root=_data_root,
        split="val",
        pipeline=_val_pipeline,
        test_mode=True,
    ),
)
# Without thrs=None a score must exceed 0 to count, which logits need not.
val_evaluator = [dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None), dict(type="CostMetric")]
test_dataloader = val_dataloader
test_evaluator = val_evaluator

data_preprocessor = dict(
    type="ImagePreprocessor",
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    num_classes=1000,
    non_blocking=True,
)
