"""Landmark retrieval on revisited Paris with a frozen ViT-S/16: `eval_image_retrieval.py --multiscale`.

    python tools/test.py configs/pwself/rparis6k.py CHECKPOINT

Images at 512 px, mean of the features at three scales. Queries are whole images, as in DINO's figures.

Hardware and hours: 1 GPU, minutes; not run here (no data).
Expected: no figure of PW-Self was published.
"""

_base_ = ["./roxford5k.py"]

model = dict(scales=[1.0, 2**-0.5, 0.5])
_pipeline = [
    dict(type="LoadImage"),
    dict(type="ThumbnailResize", size=512),
    dict(type="mmpretrain.PackInputs"),
]
_dataset = dict(name="rparis6k", pipeline=_pipeline)
test_dataloader = dict(dataset=_dataset)
test_cfg = dict(bank_dataloader=dict(dataset=_dataset))
