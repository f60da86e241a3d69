"""Retrieval on real photos with the ResNet-50 of Keras.

The weights are fetched and converted as configs/anchornet/resnet50_keras.py says.

    python tools/test.py configs/pwself/photo_retrieval_resnet50.py work_dirs/weights/resnet50_keras.pth

Hardware and hours: 2 CPU cores, about ten minutes.
Expected: see configs/pwself/EVALUATION.md.
"""

_base_ = ["../_base_/runtime.py", "../_base_/evaluation/photo_retrieval.py"]

model = dict(
    type="FeatureExtractor",
    backbone=dict(
        type="mmpretrain.ResNet",
        depth=50,
        style="caffe",
        out_indices=(3,),
        norm_cfg=dict(type="BN", eps=1e-3),
    ),
    pool="mean",
)
data_preprocessor = dict(mean=(123.68, 116.779, 103.939), std=(1.0, 1.0, 1.0))
