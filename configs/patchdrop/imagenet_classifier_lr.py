"""PatchDrop stage 0 on ImageNet-1k: the low-resolution classifier, 56 px, ResNet-50.

    python tools/train.py configs/patchdrop/imagenet_classifier_lr.py

Hardware and hours: not run at this length; the published run used GPUs it does not name.
Expected: not measured. The paper's figures could not be checked and are not quoted.
"""

_base_ = ["../_base_/runtime.py", "./_base_/imagenet.py", "./_base_/large_classifier.py"]

data_preprocessor = dict(view=dict(type="LowResolutionViewPreprocessor", size=56))
