"""PW-Self: the model and the hooks that all trainings share, with the published settings."""

_base_ = ["../_base_/runtime.py"]

model = dict(
    type="PWSelfPretrainer",
    backbone=dict(
        type="VisionTransformerBackbone",
        img_size=224,
        patch_size=8,
        drop_path_rate=0.1,
        pos_resize="dino",
        crop_remainder=True,
    ),
    head=dict(type="ProjectionHead", out_dim=10000, norm_last_layer=True),
    loss=dict(type="PWSelfLoss", student_temperature=0.1, center_momentum=0.9),
    matching="published",
)
custom_hooks = [
    dict(type="ProgressHook"),
    dict(type="FreezeLastLayerHook", epochs=1),
    dict(type="PWSelfTeacherHook", momentum=0.996, temperature=0.04),
]
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=3))
