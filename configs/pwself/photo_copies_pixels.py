"""Copy detection on real photos by their pixels at 16 x 16: the floor.

    python tools/test.py configs/pwself/photo_copies_pixels.py

Hardware and hours: 2 CPU cores, under a minute.
Expected: see configs/pwself/EVALUATION.md.
"""

_base_ = ["../_base_/runtime.py", "../_base_/evaluation/photo_copies.py"]

model = dict(type="FeatureExtractor", backbone=dict(type="PixelBackbone"))
_pipeline = [
    dict(type="LoadImage"),
    dict(type="mmpretrain.Resize", scale=(16, 16), interpolation="bicubic", backend="pillow"),
    dict(type="mmpretrain.PackInputs"),
]
test_dataloader = dict(dataset=dict(pipeline=_pipeline))
test_cfg = dict(bank_dataloader=dict(dataset=dict(pipeline=_pipeline)))
