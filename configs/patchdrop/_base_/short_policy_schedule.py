"""Adam with a cosine over a few epochs in bfloat16, for a CPU."""

optim_wrapper = dict(type="AmpOptimWrapper", dtype="bfloat16", optimizer=dict(type="Adam", lr=1e-3))
param_scheduler = dict(type="CosineAnnealingLR", T_max=4, convert_to_iter_based=True)
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=1)
val_cfg = dict()
test_cfg = dict()
val_evaluator = [dict(type="PatchDropPolicyMetric"), dict(type="CostMetric")]
test_evaluator = val_evaluator
