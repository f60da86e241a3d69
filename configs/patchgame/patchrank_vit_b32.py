"""PatchRank on ImageNet-1k: ViT-B/32 at 384 px from the best k of 144 patches, with its own preprocessing.

    tools/test.py configs/patchgame/patchrank_vit_b32.py SPEAKER --cfg-options model.backbone.checkpoint=VIT

SPEAKER is a run of `resnet18_s32.py` or the authors' file, VIT timm's weights of the ViT. Its name occurs three
times: model, preprocessor, pipeline.

Hardware and hours: 1 GPU, about 30 minutes; not run here (no ImageNet).
Expected: the authors report 58.4 top-1, 80.9 top-5 at k = 75 with other preprocessing, see
`patchrank_vit_b32_legacy.py` (not reproduced).
"""

_base_ = ["../_base_/runtime.py"]

model = dict(
    type="TimmPatchClassifier",
    backbone=dict(type="TimmViTBackbone", model_name="vit_base_patch32_384", num_classes=1000),
    own_checkpoint=False,
)
data_preprocessor = dict(type="TimmPreprocessor", model_name="vit_base_patch32_384")
test_dataloader = dict(
    batch_size=128,
    num_workers=10,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageNetDataset",
        data_root="data/imagenet",
        split="val",
        pipeline=[
            dict(type="LoadImage"),
            dict(type="TimmEvalCrop", model_name="vit_base_patch32_384"),
            dict(type="mmpretrain.PackInputs"),
        ],
        test_mode=True,
    ),
)
test_cfg = dict(
    type="PatchRankLoop",
    ks=[9, 18, 36, 72, 75, 108, 144],
    rankers=dict(
        random=dict(type="RandomSelector", patch_size=32),
        centre=dict(type="CentreSelector", patch_size=32),
        gradient=dict(type="GradientSelector", patch_size=32),
        attention=dict(type="ClassAttentionSelector"),
        speaker=dict(config="configs/patchgame/resnet18_s32.py"),
    ),
)
test_evaluator = dict(type="mmpretrain.Accuracy")
