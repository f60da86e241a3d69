"""PatchGame's ranks before a ViT: the best patches of the rank network, the others never computed.

    python tools/test.py configs/combined/ranks_vit.py

Hardware and hours: 2 CPU cores, half a minute.
Expected: configs/combined/README.md.
"""

_base_ = ["./_base_.py"]

compare = dict(label="PatchGame ranks + ViT", knob="model.keep", values=(8, 16, 32, 48), order=60)
model = dict(
    type="SelectedClassifier",
    selector=dict(config="configs/patchgame/quick.py"),
    classifier=dict(config="configs/dge/dense_quick.py"),
    use="drop",
    keep=32,
)
