"""The dense ViT with token merging: a plain transformer that goes on with fewer tokens, to compare with.

    python tools/test.py configs/combined/tome.py configs/dge/checkpoints/dense_quick.pth

Hardware and hours: 2 CPU cores, half a minute.
Expected: configs/combined/README.md.
"""

_base_ = ["./_base_.py"]

compare = dict(
    label="ToMe",
    checkpoint="configs/dge/checkpoints/dense_quick.pth",
    knob="model.share",
    values=(0.5, 0.6, 0.8),
    order=2,
)
model = dict(
    type="TokenMergingClassifier",
    share=0.6,
    backbone=dict(
        type="VisionTransformerBackbone",
        arch=dict(embed_dims=128, depth=4, num_heads=4),
        img_size=32,
        patch_size=4,
        mlp_ratio=2,
    ),
    head=dict(type="LinearHead", num_classes=10, in_channels=128),
)
