"""PatchGame on ImageNet-1k with patches of 16 px: 196 symbols per image.

    tools/dist_train.sh configs/patchgame/resnet18_s16.py 4

Hardware and hours: 4 GPUs x 128 images, 100 epochs; not run here yet.
Expected: no figure could be retrieved from the paper.
"""

_base_ = ["./_base_.py", "../_base_/datasets/imagenet_two_views.py"]

model = dict(
    ranker=dict(stride=16),
    symbol=dict(patch_size=16),
    selector=dict(count=196),
    patch_size=16,
)
