"""The three networks together: DenseNet-201 on the shrunk image, then on four windows."""

model = dict(
    type="AnchorNetEnsembleClassifier",
    anchor=dict(
        type="AnchorNetClassifier",
        backbone=dict(type="AnchorNetBackbone"),
        head=dict(type="AnchorNetCAMHead", num_classes=1000),
        selector=dict(type="CAMPatchSelector", num_patches=4, iou_limits=0.3),
    ),
    resized=dict(
        type="AnchorNetResizedClassifier",
        backbone=dict(type="TorchvisionBackbone", model_name="densenet201", num_classes=1000),
        view_size=95,
    ),
    patch=dict(
        type="AnchorNetViewClassifier",
        backbone=dict(type="TorchvisionBackbone", model_name="densenet201", num_classes=1000),
    ),
    batch_size=256,
)
