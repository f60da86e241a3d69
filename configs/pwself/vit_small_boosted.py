"""ViT-S/8 pre-trained by PW-Self on ImageNet-1k with DINO's boosted settings, 300 epochs.

    tools/dist_train.sh configs/pwself/vit_small_boosted.py 4

Hardware and hours: 4 GPUs x 6 images; not run here yet.
Expected: no figure was published; DINO's boosted ViT-S/16 has 73.3 k-NN (its README).
"""

_base_ = [
    "./_base_.py",
    "../_base_/datasets/imagenet_multiview.py",
    "../_base_/schedules/adamw_dino.py",
]

model = dict(backbone=dict(arch="small"), head=dict(in_channels=384, norm_last_layer=False))
custom_hooks = [
    dict(type="ProgressHook"),
    dict(type="FreezeLastLayerHook", epochs=1),
    dict(
        type="PWSelfTeacherHook",
        momentum=0.996,
        temperature=0.07,
        warmup_temperature=0.04,
        warmup_epochs=30,
    ),
]
train_cfg = dict(max_epochs=300)
