"""Copydays, all 20 blocks against the originals, squeezed to 320 x 320 px: data/copydays/<block>/."""

_copies = dict(
    batch_size=16,
    num_workers=10,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="CopydaysDataset",
        data_root="data/copydays",
        pipeline=[
            dict(type="LoadImage"),
            dict(
                type="mmpretrain.Resize",
                scale=(320, 320),
                interpolation="bicubic",
                backend="pillow",
            ),
            dict(type="mmpretrain.PackInputs"),
        ],
        test_mode=True,
    ),
)

data_preprocessor = dict(
    type="ImagePreprocessor", mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)
)
test_dataloader = _copies
test_cfg = dict(
    type="FeatureTestLoop",
    bank_dataloader=dict(_copies, dataset=dict(_copies["dataset"], blocks=["original"])),
    cache="work_dirs/features",
)
test_evaluator = dict(type="CopyDetectionMetric", top=20)
