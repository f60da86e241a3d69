"""Patch-token transformer for CIFAR, trained on 4 to 16 random patches of each image."""

model = dict(
    type="PatchDropTokenClassifier",
    backbone=dict(
        type="VisionTransformerBackbone",
        arch=dict(embed_dims=192, depth=6, num_heads=3),
        img_size=32,
        patch_size=4,
        mlp_ratio=2,
    ),
    head=dict(type="LinearHead", num_classes=10, in_channels=192),
    train_keep=(4, 16),
)
