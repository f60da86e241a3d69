"""Weighted k-NN on ImageNet-1k, or any class folders, with a frozen ViT-S/16: `eval_knn.py`.

    python tools/test.py configs/pwself/knn.py CHECKPOINT
    tools/dist_test.sh configs/pwself/knn.py CHECKPOINT 8

CHECKPOINT is a run of this project, one of the authors' or DINO's files, or a name such as dino_vits16.

Hardware and hours: 1 GPU, about 10 minutes for ImageNet-1k; not run here (no ImageNet).
Expected: 74.5 top-1 at k = 20 for DINO's dino_vits16 (its README).
"""

_base_ = ["../_base_/runtime.py", "../_base_/evaluation/imagenet_224.py"]

model = dict(
    type="FeatureExtractor",
    backbone=dict(type="VisionTransformerBackbone", arch="small", patch_size=16, pos_resize="dino"),
    pool="cls",
    checkpoint_key="teacher",
)
test_cfg = dict(
    type="FeatureTestLoop",
    bank_dataloader=dict(
        _base_.test_dataloader, dataset=dict(_base_.test_dataloader.dataset, split="train")
    ),
    cache="work_dirs/features",
)
test_evaluator = dict(type="KNNMetric", ks=(10, 20, 100, 200), temperature=0.07)
