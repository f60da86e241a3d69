"""Two trained models together on the quick test set; nothing is trained."""

_base_ = ["../_base_/runtime.py", "../_base_/datasets/cifar10_quick.py"]

train_dataloader = None
val_dataloader = None
val_evaluator = None
test_cfg = dict()
test_evaluator = [dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None), dict(type="CostMetric")]
