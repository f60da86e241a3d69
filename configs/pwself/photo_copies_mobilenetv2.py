"""Copy detection on real photos with torchvision's MobileNetV2 (python tools/prepare_data.py mobilenetv2).

    python tools/test.py configs/pwself/photo_copies_mobilenetv2.py data/weights/mobilenet_v2-b0353104.pth

Hardware and hours: 2 CPU cores, about two minutes.
Expected: see configs/pwself/EVALUATION.md.
"""

_base_ = ["../_base_/runtime.py", "../_base_/evaluation/photo_copies.py"]

model = dict(
    type="FeatureExtractor",
    backbone=dict(type="TorchvisionBackbone", model_name="mobilenet_v2", output="tokens"),
    pool="mean",
)
