"""Adam at a constant learning rate, and what is reported of a policy.

The official runs go on until they are stopped; 300 epochs stand for that.
"""

optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=1e-4))
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=5)
val_cfg = dict()
test_cfg = dict()
val_evaluator = [dict(type="PatchDropPolicyMetric"), dict(type="CostMetric")]
test_evaluator = val_evaluator
