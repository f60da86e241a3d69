"""Weighted k-NN on ImageNet-1k with the listener's ResNet-18: `eval_knn.py` of the authors.

    python tools/test.py configs/patchgame/knn.py CHECKPOINT
    tools/dist_test.sh configs/patchgame/knn.py CHECKPOINT 8

CHECKPOINT is a run of this project or the authors' file.

Hardware and hours: 1 GPU, about 10 minutes for ImageNet-1k; not run here (no ImageNet).
Expected: 30.3 top-1, 49.9 top-5 at k = 20 (authors' README, S = 32, 100 epochs; not reproduced).
"""

_base_ = ["../_base_/runtime.py", "../_base_/evaluation/imagenet_224.py"]

model = dict(
    type="FeatureExtractor",
    backbone=dict(type="TorchvisionBackbone", model_name="resnet18", output="features"),
    checkpoint_key="receiver.vision",
)
test_cfg = dict(
    type="FeatureTestLoop",
    bank_dataloader=dict(
        _base_.test_dataloader, dataset=dict(_base_.test_dataloader.dataset, split="train")
    ),
    cache="work_dirs/features",
)
test_evaluator = dict(type="KNNMetric", ks=(10, 20, 100, 200), temperature=0.07)
