"""Evaluation crop of DINO: shorter side 256 px, bicubic, centre 224 px; ImageNet's mean and deviation.

For class folders `<data_root>/{train,val}/<class>/<image>`: the k-NN bank is the training set.
"""

_test_data = dict(
    batch_size=128,
    num_workers=10,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageFolderDataset",
        data_root="data/imagenet",
        split="val",
        pipeline=[
            dict(type="LoadImage"),
            dict(
                type="mmpretrain.ResizeEdge",
                scale=256,
                edge="short",
                interpolation="bicubic",
                backend="pillow",
            ),
            dict(type="mmpretrain.CenterCrop", crop_size=224),
            dict(type="mmpretrain.PackInputs"),
        ],
        test_mode=True,
    ),
)

data_preprocessor = dict(
    type="ImagePreprocessor", mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)
)
test_dataloader = _test_data
