"""PatchDrop's policy before DGE: what it does not acquire gets the mean colour, and is queried coarsely.

    python tools/test.py configs/combined/policy_dge.py

Hardware and hours: 2 CPU cores, half a minute.
Expected: configs/combined/README.md.
"""

_base_ = ["./_base_.py"]

compare = dict(label="PatchDrop policy + DGE", order=64)
model = dict(
    type="SelectedClassifier",
    selector=dict(config="configs/patchdrop/quick_finetune.py"),
    classifier=dict(config="configs/dge/quick.py"),
    use="erase",
)
