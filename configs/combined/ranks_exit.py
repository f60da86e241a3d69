"""PatchGame's ranks before AnchorNet's early exit: windows in the order of the rank network.

    python tools/test.py configs/combined/ranks_exit.py

Hardware and hours: 2 CPU cores, a minute.
Expected: configs/combined/README.md.
"""

_base_ = ["./_base_.py"]

compare = dict(
    label="PatchGame ranks + early exit", knob="budget", values=(22e6, 28e6, 38e6), order=65
)
model = dict(
    type="SelectedClassifier",
    selector=dict(config="configs/patchgame/quick.py"),
    classifier=dict(config="configs/anchornet/quick_dynamic.py"),
    use="order",
)
