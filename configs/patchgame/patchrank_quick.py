"""Small ViT on CIFAR-10, evaluated by PatchRank: accuracy from the best k of 64 patches, five rankers.

    python tools/train.py configs/patchgame/patchrank_quick.py
    python tools/train.py configs/patchgame/quick.py
    python tools/test.py configs/patchgame/patchrank_quick.py work_dirs/patchgame/patchrank_quick

Hardware and hours: 2 CPU cores, 3 minutes for this ViT, 10 for the ranker, 2 for the curves.
Expected: 57.6 top-1 from all patches, 52.9 from a random half at twice the speed (3 seeds, README.md).
"""

_base_ = [
    "../_base_/runtime.py",
    "../_base_/datasets/cifar10_quick.py",
    "../_base_/schedules/adamw_quick.py",
]

model = dict(
    type="PatchClassifier",
    backbone=dict(
        type="VisionTransformerBackbone",
        arch=dict(embed_dims=128, depth=4, num_heads=4),
        img_size=32,
        patch_size=4,
        mlp_ratio=2,
    ),
    head=dict(
        type="LinearHead",
        num_classes=10,
        in_channels=128,
        loss=dict(type="CrossEntropyLoss", label_smooth=0.1),
    ),
)
test_cfg = dict(
    type="PatchRankLoop",
    ks=[4, 8, 16, 32, 48, 64],
    rankers=dict(
        random=dict(type="RandomSelector", patch_size=4),
        centre=dict(type="CentreSelector", patch_size=4),
        gradient=dict(type="GradientSelector", patch_size=4),
        attention=dict(type="ClassAttentionSelector"),
        speaker=dict(config="configs/patchgame/quick.py", checkpoint="work_dirs/patchgame/quick"),
    ),
)
