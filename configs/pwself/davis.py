"""Mask propagation on DAVIS 2017 with a frozen ViT-S/16: `eval_video_segmentation.py` and its scoring.

    python tools/test.py configs/pwself/davis.py CHECKPOINT

Masks are written to masks/ in the work dir. The deviation 0.228 of red is the official script's; ImageNet's
is 0.229.

Hardware and hours: 1 GPU, about 10 minutes; not run here (no data).
Expected: 71.4 J&F for DINO's ViT-B/8 (paper).
"""

_base_ = ["../_base_/runtime.py"]

model = dict(
    type="FeatureExtractor",
    backbone=dict(type="VisionTransformerBackbone", arch="small", patch_size=16, pos_resize="dino"),
    checkpoint_key="teacher",
)
data_preprocessor = dict(
    type="ImagePreprocessor", mean=(123.675, 116.28, 103.53), std=(58.14, 57.12, 57.375)
)
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="pseudo_collate"),
    dataset=dict(type="DavisDataset", data_root="data/davis2017", split="val"),
)
test_cfg = dict(type="PropagationTestLoop", n_last_frames=7, radius=12, topk=5)
test_evaluator = dict(type="DavisMetric")
