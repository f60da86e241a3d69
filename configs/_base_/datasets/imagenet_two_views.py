"""ImageNet-1k without labels: two views of 224 px of every image, as in PatchGame.

The first view is always blurred, the second one rarely, and sometimes solarised. Colours are changed by
Pillow in the loader; photometry='device' leaves that to the GPU.
"""

_pipeline = [
    dict(type="LoadImage"),
    dict(
        type="MultiView",
        source_size=None,
        views=[
            dict(size=224, scale=(0.14, 1.0), blur=1.0),
            dict(size=224, scale=(0.14, 1.0), blur=0.1, solarize=0.2),
        ],
    ),
]

train_dataloader = dict(
    batch_size=128,
    num_workers=10,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageNetDataset", data_root="data/imagenet", split="train", pipeline=_pipeline
    ),
)

data_preprocessor = dict(type="MultiViewPreprocessor", non_blocking=True)
