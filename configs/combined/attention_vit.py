"""PW-Self's class attention before a ViT: what the self-supervised teacher looks at, the rest never computed.

    python tools/test.py configs/combined/attention_vit.py

Hardware and hours: 2 CPU cores, half a minute.
Expected: configs/combined/README.md.
"""

_base_ = ["./_base_.py"]

compare = dict(label="PW-Self attention + ViT", knob="model.keep", values=(8, 16, 32, 48), order=61)
model = dict(
    type="SelectedClassifier",
    selector=dict(config="configs/pwself/quick.py"),
    classifier=dict(config="configs/dge/dense_quick.py"),
    use="drop",
    keep=32,
)
