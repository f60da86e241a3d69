"""AnchorNet stage 3 on ImageNet-1k: ResNet-50 fine-tuned on the four windows that stage 1 chooses.

    tools/dist_train.sh configs/anchornet/resnet50_patch.py 8

The start is torchvision's ImageNet file of the network, converted as for resnet50_resized.py.
Hardware and hours: 8 GPUs x 32 images, 30 epochs; not run here.
Expected: not published.
"""

_base_ = ["../_base_/runtime.py", "./_base_/imagenet.py", "./_base_/downstream.py"]

model = dict(
    type="AnchorNetPatchClassifier",
    backbone=dict(type="TorchvisionBackbone", model_name="resnet50", num_classes=1000),
    evaluation="five_crop",
    anchor=dict(
        type="AnchorNetClassifier",
        backbone=dict(type="AnchorNetBackbone"),
        head=dict(type="AnchorNetCAMHead", num_classes=1000),
        selector=dict(type="CAMPatchSelector", num_patches=4, iou_limits=0.3),
        init_cfg=dict(type="Pretrained", checkpoint="work_dirs/anchornet/anchornet/last.pth"),
    ),
    init_cfg=dict(type="Pretrained", checkpoint="work_dirs/weights/resnet50.pth"),
)
val_dataloader = dict(batch_size=64)
default_hooks = dict(checkpoint=dict(save_best="accuracy/top1"))
