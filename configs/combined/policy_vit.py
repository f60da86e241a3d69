"""PatchDrop's policy before a ViT: the patches that it acquires, the others never computed.

    python tools/test.py configs/combined/policy_vit.py

Hardware and hours: 2 CPU cores, half a minute.
Expected: configs/combined/README.md.
"""

_base_ = ["./_base_.py"]

compare = dict(label="PatchDrop policy + ViT", order=63)
model = dict(
    type="SelectedClassifier",
    selector=dict(config="configs/patchdrop/quick_finetune.py"),
    classifier=dict(config="configs/dge/dense_quick.py"),
    use="drop",
    keep=None,
)
