"""CIFAR-10 at 32 px, or the embedded cut of Fashion-MNIST where CIFAR-10 was not prepared.

Loaded in the main process: reading is cheap beside the model on a CPU, and there is no core to
spare.
"""

_data_root = "data/cifar10"

_train_pipeline = [
    dict(type="mmpretrain.RandomCrop", crop_size=32, padding=4),
    dict(type="mmpretrain.RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="mmpretrain.PackInputs"),
]
_val_pipeline = [dict(type="mmpretrain.PackInputs")]

train_dataloader = dict(
    batch_size=128,
    num_workers=0,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="QuickStartDataset", data_root=_data_root, split="train", pipeline=_train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=256,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="QuickStartDataset",
        data_root=_data_root,
        split="test",
        pipeline=_val_pipeline,
        test_mode=True,
    ),
)
# Without thrs=None a score must exceed 0 to count, which logits need not.
val_evaluator = dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None)
test_dataloader = val_dataloader
test_evaluator = val_evaluator

data_preprocessor = dict(
    type="ImagePreprocessor",
    mean=(125.307, 122.950, 113.866),
    std=(62.993, 62.089, 66.705),
    num_classes=10,
)
