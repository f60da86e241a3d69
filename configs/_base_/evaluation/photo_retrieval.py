"""Retrieval on real photos: 1322 photos of fruit find those of their kind among 675 others, at 160 px.

python tools/prepare_data.py grocery
"""

_photos = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageFolderDataset",
        data_root="data/grocery",
        split="test",
        pipeline=[
            dict(type="LoadImage"),
            dict(
                type="mmpretrain.ResizeEdge",
                scale=176,
                edge="short",
                interpolation="bicubic",
                backend="pillow",
            ),
            dict(type="mmpretrain.CenterCrop", crop_size=160),
            dict(type="mmpretrain.PackInputs"),
        ],
        test_mode=True,
    ),
)

data_preprocessor = dict(
    type="ImagePreprocessor", mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)
)
test_dataloader = _photos
test_cfg = dict(
    type="FeatureTestLoop",
    bank_dataloader=dict(_photos, dataset=dict(_photos["dataset"], split="train")),
    cache="work_dirs/features",
)
test_evaluator = [dict(type="RetrievalMetric", ks=(1, 5, 10)), dict(type="KNNMetric", ks=(10, 20))]
