"""CIFAR-100 as PatchDrop reads it: zero-padded crop and flip, statistics of its repository (CIFAR-10's).

Loaded in the main process: reading is cheap beside the model on a CPU; set num_workers on a GPU.
"""

_train_pipeline = [
    dict(type="mmpretrain.RandomCrop", crop_size=32, padding=4),
    dict(type="mmpretrain.RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="mmpretrain.PackInputs"),
]
_test_pipeline = [dict(type="mmpretrain.PackInputs")]

train_dataloader = dict(
    batch_size=128,
    num_workers=0,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="CIFAR100Dataset", data_root="data/cifar100", split="train", pipeline=_train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=250,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="CIFAR100Dataset",
        data_root="data/cifar100",
        split="test",
        pipeline=_test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader

data_preprocessor = dict(
    type="ImagePreprocessor",
    mean=(125.3, 123.0, 113.9),
    std=(63.0, 62.1, 66.7),
    num_classes=100,
)
