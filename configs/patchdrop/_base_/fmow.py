"""fMoW crops as PatchDrop reads them: short side 224, random crop 224, no flip."""

_resize = dict(
    type="mmpretrain.ResizeEdge",
    scale=224,
    edge="short",
    interpolation="bilinear",
    backend="pillow",
)
_train_pipeline = [
    dict(type="LoadImage"),
    _resize,
    dict(type="mmpretrain.RandomCrop", crop_size=224),
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
        type="FMoWDataset",
        data_root="data/fmow",
        ann_file="train.csv",
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
        type="FMoWDataset",
        data_root="data/fmow",
        ann_file="test.csv",
        pipeline=_test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader

data_preprocessor = dict(type="ImagePreprocessor", num_classes=62)
