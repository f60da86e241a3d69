"""Weighted k-NN on CIFAR-10 at 32 px (the embedded Fashion-MNIST cut where it was not prepared).

A config adds the model, such as a `FeatureExtractor` with its backbone.
"""

_test_data = dict(
    batch_size=256,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="QuickStartDataset",
        data_root="data/cifar10",
        split="test",
        pipeline=[dict(type="mmpretrain.PackInputs")],
        test_mode=True,
    ),
)
_bank_data = dict(_test_data, dataset=dict(_test_data["dataset"], split="train"))

data_preprocessor = dict(
    type="ImagePreprocessor", mean=(125.307, 122.950, 113.866), std=(62.993, 62.089, 66.705)
)
test_dataloader = _test_data
test_cfg = dict(type="FeatureTestLoop", bank_dataloader=_bank_data, cache="work_dirs/features")
test_evaluator = dict(type="KNNMetric", ks=(10, 20, 100, 200), temperature=0.07, num_classes=10)
