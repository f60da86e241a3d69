"""PatchGame on ImageNet-1k with patches of 32 px: the command of the authors' README.

    tools/dist_train.sh configs/patchgame/resnet18_s32.py 4

Hardware and hours: 4 GPUs x 128 images, 100 epochs; not run here yet.
Expected: k-NN 30.3 top-1, 49.9 top-5 at k = 20 (authors' README, not reproduced).
"""

_base_ = ["./_base_.py", "../_base_/datasets/imagenet_two_views.py"]
