"""Small DeiT-DGE on CIFAR-10 (the embedded cut of Fashion-MNIST where it was not prepared).

    python tools/train.py configs/dge/quick.py

Hardware and hours: 2 CPU cores, 4 minutes.
Expected: 58.1 top-1 at 0.55 of the dense twin's MACs (mean of 3 seeds, docs/benchmarks.md).
"""

_base_ = [
    "./_base_.py",
    "../_base_/datasets/cifar10_quick.py",
    "../_base_/schedules/adamw_quick.py",
]

compare = dict(label="DGE", knob="model.budget", values=(0.5, 0.6, 0.8, 1.0), order=3)
model = dict(
    backbone=dict(
        arch=dict(embed_dims=128, depth=4, num_heads=4),
        img_size=32,
        patch_size=4,
        mlp_ratio=2,
        splits=[2, 1],
        drop_path_rate=0.0,
    ),
    head=dict(num_classes=10, in_channels=128, loss=dict(label_smooth=0.1)),
    # Half the published weight: routers stay fine a little longer while features form.
    budget_loss=dict(accounting="corrected", loss_weight=0.5),
    accounting="corrected",
)
custom_hooks = [dict(type="ProgressHook"), dict(type="DGEBudgetHook")]
val_evaluator = [
    dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None),
    dict(type="CostMetric"),
    dict(type="DGEGranularityMetric", splits=[2, 1], per_block=False),
]
test_evaluator = val_evaluator
