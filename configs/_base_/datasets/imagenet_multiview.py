"""ImageNet-1k without labels: two views of 224 px and eight of 96 px of every image, as in PW-Self.

Every image is squeezed to 256 x 256 px first. Colours are changed by Pillow in the loader;
photometry='device' leaves that to the GPU.
"""

_train_pipeline = [
    dict(type="LoadImage"),
    dict(
        type="MultiView",
        source_size=256,
        geometry="shared",
        photometry="loader",
        views=[
            dict(size=224, scale=(0.4, 1.0), blur=1.0),
            dict(size=224, scale=(0.4, 1.0), blur=0.1, solarize=0.2),
            dict(num=8, size=96, scale=(0.05, 0.4), blur=0.5),
        ],
    ),
]

train_dataloader = dict(
    batch_size=6,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageNetDataset", data_root="data/imagenet", split="train", pipeline=_train_pipeline
    ),
)

data_preprocessor = dict(type="MultiViewPreprocessor", non_blocking=True)
