"""DeiT with the Dynamic Grained Encoder: the model and the hooks all its experiments share."""

_base_ = ["../_base_/runtime.py"]

model = dict(
    type="DGEClassifier",
    backbone=dict(
        type="DGEVisionTransformerBackbone",
        img_size=256,
        patch_size=16,
        splits=[4, 2, 1],
        drop_path_rate=0.1,
        drop_path_mode="query",
    ),
    head=dict(type="LinearHead", num_classes=1000, loss=dict(type="CrossEntropyLoss")),
    budget_loss=dict(
        type="DGEBudgetLoss", budget=0.5, loss_weight=1.0, scope="process", accounting="upstream"
    ),
    accounting="upstream",
)
custom_hooks = [
    dict(type="ProgressHook"),
    dict(type="DGEBudgetHook"),
    dict(type="ModelEMAHook", momentum=4e-5),
]
