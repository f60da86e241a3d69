"""Copy detection on real photos: 300 of 919 photos, each edited in five stacked ways, at 160 px.

python tools/prepare_data.py open_images; python tools/prepare_data.py scratch_backgrounds
"""

_copies = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="PhotoCopiesDataset",
        data_root="data/open_images",
        hosts_root="data/scratch_backgrounds",
        split="query",
        count=300,
        pipeline=[
            dict(type="LoadImage"),
            dict(
                type="mmpretrain.Resize",
                scale=(160, 160),
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
    bank_dataloader=dict(_copies, dataset=dict(_copies["dataset"], split="database")),
    cache="work_dirs/features",
)
test_evaluator = dict(type="CopyDetectionMetric", recall=True)
