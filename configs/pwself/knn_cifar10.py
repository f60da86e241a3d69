"""Weighted k-NN on CIFAR-10 with the frozen backbone of a small PW-Self run.

    python tools/test.py configs/pwself/knn_cifar10.py work_dirs/pwself/quick

Hardware and hours: 2 CPU cores, about a minute.
Expected: 35.2 top-1 at k = 20 after quick.py with containment matching (one seed); untrained 29.8, pixels
45.7.
"""

_base_ = ["../_base_/runtime.py", "../_base_/evaluation/knn_cifar10.py"]

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
