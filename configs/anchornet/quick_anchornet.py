"""Stage 1 of quick.py: a trunk of three blocks, windows of 15 px every 2 px in images of 32 px.

    python tools/train.py configs/anchornet/quick_anchornet.py

Hardware and hours: 1 CPU core, 2 minutes.
Expected: 67.9 top-1 (seed 0).
"""

_base_ = [
    "../_base_/runtime.py",
    "../_base_/datasets/cifar10_quick.py",
    "./_base_/quick.py",
]

model = dict(
    type="AnchorNetClassifier",
    backbone=dict(
        type="AnchorNetBackbone",
        blocks=[(1, 16, 1), (4, 32, 1), (4, 64, 1)],
        out_channels=256,
    ),
    head=dict(type="AnchorNetCAMHead", num_classes=10, in_channels=256),
    selector=dict(type="CAMPatchSelector", num_patches=2, iou_limits=0.3),
)
