"""ViT-S/8 pre-trained by PW-Self on ImageNet-100 (data/imagenet100/train/<class>/<image>).

    tools/dist_train.sh configs/pwself/vit_small_in100.py 4

Hardware and hours: 4 GPUs x 6 images; not run here yet.
Expected: no figure was published.
"""

_base_ = [
    "./_base_.py",
    "../_base_/datasets/imagenet_multiview.py",
    "../_base_/schedules/adamw_dino.py",
]

model = dict(backbone=dict(arch="small"), head=dict(in_channels=384))
train_dataloader = dict(dataset=dict(type="ImageFolderDataset", data_root="data/imagenet100"))
