"""Landmark retrieval on revisited Oxford with a frozen ViT-S/16: `eval_image_retrieval.py`.

    python tools/test.py configs/pwself/roxford5k.py CHECKPOINT

Images at 224 px, one scale. Queries are whole images, as in DINO's figures; the benchmark cuts them to the
landmark: test_dataloader.dataset.crop_query=True.

Hardware and hours: 1 GPU, minutes; not run here (no data).
Expected: no figure of PW-Self was published.
"""

_base_ = ["../_base_/runtime.py", "../_base_/evaluation/revisited.py"]

model = dict(
    type="FeatureExtractor",
    backbone=dict(
        type="VisionTransformerBackbone",
        arch="small",
        patch_size=16,
        pos_resize="dino",
        crop_remainder=True,
    ),
    pool="cls",
    checkpoint_key="teacher",
)
