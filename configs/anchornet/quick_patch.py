"""Stage 3 of quick.py: the same ResNet on the windows that stage 1 chooses.

    python tools/train.py configs/anchornet/quick_patch.py

Hardware and hours: 1 CPU core, 4 minutes.
Expected: 72.5 top-1 on the mean of two windows (seed 0).
"""

_base_ = [
    "../_base_/runtime.py",
    "../_base_/datasets/cifar10_quick.py",
    "./_base_/quick.py",
]

model = dict(
    type="AnchorNetPatchClassifier",
    backbone=dict(type="CIFARResNetBackbone", num_blocks=[1, 1, 1, 1], base_channels=32),
    head=dict(type="LinearHead", num_classes=10, in_channels=256, pool="mean"),
    evaluation="localised",
    anchor=dict(
        type="AnchorNetClassifier",
        backbone=dict(
            type="AnchorNetBackbone",
            blocks=[(1, 16, 1), (4, 32, 1), (4, 64, 1)],
            out_channels=256,
        ),
        head=dict(type="AnchorNetCAMHead", num_classes=10, in_channels=256),
        selector=dict(type="CAMPatchSelector", num_patches=2, iou_limits=0.3),
        init_cfg=dict(type="Pretrained", checkpoint="work_dirs/anchornet/quick_anchornet/last.pth"),
    ),
)
