"""CIFAR-10 at 32 px without labels: two random views of every image, in training and in validation.

The embedded cut of Fashion-MNIST where CIFAR-10 was not prepared. Views are cut by Pillow in the main
process, their colours are changed batch by batch.
"""

_view = dict(size=32, scale=(0.4, 1.0))
_pipeline = [
    dict(type="MultiView", source_size=None, photometry="device", views=[_view, _view]),
]

train_dataloader = dict(
    batch_size=128,
    num_workers=0,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="QuickStartDataset", data_root="data/cifar10", split="train", pipeline=_pipeline
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=0,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="QuickStartDataset", data_root="data/cifar10", split="test", pipeline=_pipeline
    ),
)
test_dataloader = val_dataloader

data_preprocessor = dict(
    type="MultiViewPreprocessor", mean=(125.307, 122.950, 113.866), std=(62.993, 62.089, 66.705)
)
