"""ViT-S/8 pre-trained by PW-Self on ImageNet-1k, 100 epochs: the command of the authors' README.

    tools/dist_train.sh configs/pwself/vit_small.py 4

Hardware and hours: 4 GPUs x 6 images; not run here yet.
Expected: no figure was published; DINO's ViT-S/16 has 69.3 k-NN after 100 epochs (its README).
"""

_base_ = [
    "./_base_.py",
    "../_base_/datasets/imagenet_multiview.py",
    "../_base_/schedules/adamw_dino.py",
]

model = dict(backbone=dict(arch="small"), head=dict(in_channels=384))
