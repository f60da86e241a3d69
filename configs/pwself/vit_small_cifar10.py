"""ViT-S/32 pre-trained by PW-Self on CIFAR-10, its images squeezed up to 256 px as the authors did.

    tools/dist_train.sh configs/pwself/vit_small_cifar10.py 4

Hardware and hours: 4 GPUs x 6 images; not run here yet.
Expected: no figure was published; the patch size is that of the authors' linear probe on CIFAR-10.
"""

_base_ = [
    "./_base_.py",
    "../_base_/datasets/imagenet_multiview.py",
    "../_base_/schedules/adamw_dino.py",
]

model = dict(backbone=dict(arch="small", patch_size=32), head=dict(in_channels=384))
train_dataloader = dict(dataset=dict(type="CIFAR10Dataset", data_root="data/cifar10"))
