"""Revisited Oxford at 224 px: data/revisited/roxford5k/{gnd_roxford5k.pkl,jpg/}. One image at a time."""

_queries = dict(
    batch_size=1,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="RevisitedDataset",
        data_root="data/revisited",
        name="roxford5k",
        split="query",
        pipeline=[
            dict(type="LoadImage"),
            dict(type="ThumbnailResize", size=224),
            dict(type="mmpretrain.PackInputs"),
        ],
        test_mode=True,
    ),
)

data_preprocessor = dict(
    type="ImagePreprocessor", mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)
)
test_dataloader = _queries
test_cfg = dict(
    type="FeatureTestLoop",
    bank_dataloader=dict(_queries, dataset=dict(_queries["dataset"], split="database")),
    cache="work_dirs/features",
)
test_evaluator = dict(type="RetrievalMetric", ks=(1, 5, 10))
