"""AnchorNet stage 2 on ImageNet-1k: DenseNet-201 fine-tuned on images shrunk to 95 px.

    tools/dist_train.sh configs/anchornet/densenet201_resized.py 8

The start is torchvision's ImageNet file of the network, converted:
    python tools/convert.py anchornet densenet201-c1103571.pth work_dirs/weights/densenet201.pth --to ours
Hardware and hours: 8 GPUs x 32 images, 30 epochs; not run here.
Expected: 70.378 top-1 (first column of the authors' table).
"""

_base_ = ["../_base_/runtime.py", "./_base_/imagenet.py", "./_base_/downstream.py"]

model = dict(
    type="AnchorNetResizedClassifier",
    backbone=dict(type="TorchvisionBackbone", model_name="densenet201", num_classes=1000),
    view_size=95,
    init_cfg=dict(type="Pretrained", checkpoint="work_dirs/weights/densenet201.pth"),
)
default_hooks = dict(checkpoint=dict(save_best="accuracy/top1"))
