"""A classifier that computes kept patches only: patch-token transformer on CIFAR-10, stage 0.

    python tools/train.py configs/patchdrop/cifar10_tokens_classifier.py

Hardware and hours: not run at this length.
Expected: not measured; its time falls with the patches (this folder's page).
"""

_base_ = ["../_base_/runtime.py", "./_base_/cifar10.py", "./_base_/token_classifier.py"]

optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05))
param_scheduler = dict(type="CosineAnnealingLR", T_max=200, convert_to_iter_based=True)
train_cfg = dict(by_epoch=True, max_epochs=200, val_interval=5)
val_cfg = dict()
test_cfg = dict()
val_evaluator = [dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None), dict(type="CostMetric")]
test_evaluator = val_evaluator
