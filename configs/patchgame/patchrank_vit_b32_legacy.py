"""PatchRank as the authors ran it: a 224 px crop blown up to 384 px by nearest, ImageNet's mean and deviation.

    tools/test.py configs/patchgame/patchrank_vit_b32_legacy.py SPEAKER --cfg-options \
        model.backbone.checkpoint=VIT

Hardware and hours: 1 GPU, about 10 minutes; not run here (no ImageNet).
Expected: 58.4 top-1, 80.9 top-5 at k = 75 (authors' README, not reproduced).
"""

_base_ = ["./patchrank_vit_b32.py"]

_view = dict(type="LowResolutionViewPreprocessor", size=224, enlarge_to=384)
data_preprocessor = dict(_delete_=True, type="ImagePreprocessor", view=_view)
test_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImage"),
            dict(
                type="mmpretrain.ResizeEdge",
                scale=256,
                edge="short",
                interpolation="bicubic",
                backend="pillow",
            ),
            dict(type="mmpretrain.CenterCrop", crop_size=224),
            dict(type="mmpretrain.PackInputs"),
        ]
    )
)
test_cfg = dict(ks=[75, 144], rankers=dict(speaker=dict(img_size=384, resize="nearest")))
