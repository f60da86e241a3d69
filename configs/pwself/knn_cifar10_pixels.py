"""Weighted k-NN on the pixels of CIFAR-10: what self-supervised features have to beat.

    python tools/test.py configs/pwself/knn_cifar10_pixels.py

Hardware and hours: 2 CPU cores, about two minutes.
Expected: 45.67 top-1 at k = 20.
"""

_base_ = ["../_base_/runtime.py", "../_base_/evaluation/knn_cifar10.py"]

model = dict(type="FeatureExtractor", backbone=dict(type="PixelBackbone"))
