"""Copydays with distractors and whitening, as in DINO's paper: images of YFCC100M, any folders.

    python tools/test.py configs/pwself/copydays_yfcc.py CHECKPOINT

data/yfcc/distractors holds 10,000 images, data/yfcc/whitening 20,000. test_evaluator.centered=True learns
the whitening about the mean, which the published figures do not.

Hardware and hours: 1 GPU, about two hours; not run here (no data).
Expected: copies/strong_mAP 85.8 for DINO's dino_vitb8 (its README).
"""

_base_ = ["./copydays.py"]

_images = dict(
    _base_.test_dataloader,
    dataset=dict(
        type="UnlabelledImageDataset",
        data_root="data/yfcc/distractors",
        pipeline=_base_.test_dataloader.dataset.pipeline,
        test_mode=True,
    ),
)
test_cfg = dict(
    distractor_dataloader=_images,
    whitening_dataloader=dict(
        _images, dataset=dict(_images["dataset"], data_root="data/yfcc/whitening")
    ),
)
