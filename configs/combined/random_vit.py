"""Random patches before a ViT: what every ranker has to beat.

    python tools/test.py configs/combined/random_vit.py

Hardware and hours: 2 CPU cores, half a minute.
Expected: configs/combined/README.md.
"""

_base_ = ["./_base_.py"]

compare = dict(label="random + ViT", knob="model.keep", values=(8, 16, 32, 48), order=62)
model = dict(
    type="SelectedClassifier",
    selector=dict(type="RandomSelector", patch_size=4),
    classifier=dict(config="configs/dge/dense_quick.py"),
    use="drop",
    keep=32,
)
