"""The three networks of quick.py together, three windows at most."""

model = dict(
    type="AnchorNetEnsembleClassifier",
    anchor=dict(
        type="AnchorNetClassifier",
        backbone=dict(
            type="AnchorNetBackbone",
            blocks=[(1, 16, 1), (4, 32, 1), (4, 64, 1)],
            out_channels=256,
        ),
        head=dict(type="AnchorNetCAMHead", num_classes=10, in_channels=256),
        selector=dict(type="CAMPatchSelector", num_patches=3, iou_limits=0.3),
    ),
    resized=dict(
        type="AnchorNetResizedClassifier",
        backbone=dict(type="CIFARResNetBackbone", num_blocks=[1, 1, 1, 1], base_channels=32),
        head=dict(type="LinearHead", num_classes=10, in_channels=256, pool="mean"),
        view_size=16,
    ),
    patch=dict(
        type="AnchorNetViewClassifier",
        backbone=dict(type="CIFARResNetBackbone", num_blocks=[1, 1, 1, 1], base_channels=32),
        head=dict(type="LinearHead", num_classes=10, in_channels=256, pool="mean"),
    ),
)
test_cfg = dict()
