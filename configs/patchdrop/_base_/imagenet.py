"""ImageNet-1k as PatchDrop reads it: short side 256, random crop 224, flip."""

_resize = dict(
    type="mmpretrain.ResizeEdge",
    scale=256,
    edge="short",
    interpolation="bilinear",
    backend="pillow",
)
_train_pipeline = [
    dict(type="LoadImage"),
    _resize,
    dict(type="mmpretrain.RandomCrop", crop_size=224),
    dict(type="mmpretrain.RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="mmpretrain.PackInputs"),
]
_test_pipeline = [
    dict(type="LoadImage"),
    _resize,
    dict(type="mmpretrain.CenterCrop", crop_size=224),
    dict(type="mmpretrain.PackInputs"),
]

train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageNetDataset",
        data_root="data/imagenet",
        split="train",
        pipeline=_train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageNetDataset",
        data_root="data/imagenet",
        split="val",
        pipeline=_test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader

data_preprocessor = dict(type="ImagePreprocessor", num_classes=1000)
