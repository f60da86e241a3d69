"""PatchDrop on CIFAR-10 with the paper's network sizes: all stages, one after the other.

    python tools/train.py configs/patchdrop/cifar10.py

Hardware and hours: not run at this length; `cifar10_short.py` is the schedule for a CPU.
Expected: not measured. The paper's figures could not be checked and are not quoted.
"""

stages = [
    "cifar10_classifier_hr.py",
    "cifar10_classifier_lr.py",
    "cifar10_pretrain.py",
    "cifar10_finetune.py",
    "cifar10_twostream.py",
]
