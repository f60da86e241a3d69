"""ImageNet-1k at 256 px with the DeiT recipe, as used by DGE.

Training: random resized crop, flip, RandAugment m9 mstd0.5 inc1, random erasing 0.25, mixup 0.8 or
CutMix 1.0, label smoothing 0.1, repeated augmentation x3. Evaluation: short side 292, centre crop
256.

Random erasing works on 8-bit images here: its normal noise is cut off at black and white (3 % of
the values), and boxes too large for the image are clipped instead of redrawn.
"""

_mean = (123.675, 116.28, 103.53)
_std = (58.395, 57.12, 57.375)
_data_root = "data/imagenet"

_train_pipeline = [
    dict(type="LoadImage"),
    dict(
        type="mmpretrain.RandomResizedCrop",
        scale=256,
        crop_ratio_range=(0.08, 1.0),
        aspect_ratio_range=(3.0 / 4.0, 4.0 / 3.0),
        interpolation="bicubic",
        backend="pillow",
    ),
    dict(type="mmpretrain.RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="RGBRandAugment", magnitude=9, magnitude_std=0.5, num_ops=2, fill=(124, 116, 104)),
    dict(
        type="mmpretrain.RandomErasing",
        erase_prob=0.25,
        mode="rand",
        min_area_ratio=0.02,
        max_area_ratio=1.0 / 3.0,
        aspect_range=(0.3, 1.0 / 0.3),
        fill_color=_mean,
        fill_std=_std,
    ),
    dict(type="mmpretrain.PackInputs"),
]
_val_pipeline = [
    dict(type="LoadImage"),
    # 292 = int(256 / 0.875)
    dict(
        type="mmpretrain.ResizeEdge",
        scale=292,
        edge="short",
        interpolation="bicubic",
        backend="pillow",
    ),
    dict(type="mmpretrain.CenterCrop", crop_size=256),
    dict(type="mmpretrain.PackInputs"),
]

train_dataloader = dict(
    batch_size=128,
    num_workers=10,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type="RepeatedAugmentationSampler", num_repeats=3, selected_round=256),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageNetDataset", data_root=_data_root, split="train", pipeline=_train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=192,
    num_workers=10,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageNetDataset",
        data_root=_data_root,
        split="val",
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
    mean=_mean,
    std=_std,
    num_classes=1000,
    non_blocking=True,
    batch_augment=dict(
        type="BatchMixup",
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        prob=1.0,
        switch_prob=0.5,
        label_smoothing=0.1,
        scope="process",
    ),
)
