"""Retrieval on real photos with the frozen backbone of a small PW-Self run, at 32 px.

    python tools/test.py configs/pwself/photo_retrieval.py work_dirs/pwself/quick

Hardware and hours: 2 CPU cores, under a minute.
Expected: see configs/pwself/EVALUATION.md.
"""

_base_ = ["../_base_/runtime.py", "../_base_/evaluation/photo_retrieval.py"]

model = dict(
    type="FeatureExtractor",
    backbone=dict(
        type="VisionTransformerBackbone",
        arch=dict(embed_dims=128, depth=3, num_heads=4),
        img_size=32,
        patch_size=8,
        mlp_ratio=2,
        pos_resize="dino",
    ),
    pool="cls",
    checkpoint_key="teacher",
)
data_preprocessor = dict(mean=(125.307, 122.950, 113.866), std=(62.993, 62.089, 66.705))
_pipeline = [
    dict(type="LoadImage"),
    dict(type="mmpretrain.Resize", scale=(32, 32), interpolation="bicubic", backend="pillow"),
    dict(type="mmpretrain.PackInputs"),
]
test_dataloader = dict(dataset=dict(pipeline=_pipeline))
test_cfg = dict(bank_dataloader=dict(dataset=dict(pipeline=_pipeline)))
