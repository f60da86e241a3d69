"""Copy detection on Copydays with a frozen ViT-B/8: `eval_copy_detection.py`.

    python tools/test.py configs/pwself/copydays.py CHECKPOINT

10,000 distractors and the images of a whitening, if there are any, are named by
test_cfg.distractor_dataloader and test_cfg.whitening_dataloader, as copydays_yfcc.py does.

Hardware and hours: 1 GPU, about half an hour; not run here (no data).
Expected: copies/strong_mAP 85.8 for DINO's dino_vitb8, with distractors and whitening (its README).
"""

_base_ = ["../_base_/runtime.py", "../_base_/evaluation/copydays.py"]

model = dict(
    type="FeatureExtractor",
    backbone=dict(type="VisionTransformerBackbone", arch="base", patch_size=8, pos_resize="dino"),
    pool="cls_gem",
    checkpoint_key="teacher",
)
