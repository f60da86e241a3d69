"""PatchDrop on CIFAR-10 in hours on a CPU: all stages and the sweep over the trade-off.

    python tools/train.py configs/patchdrop/cifar10_short.py

Hardware and hours: 2 CPU cores, about 2 hours when they are free.
Expected: 86.3 top-1 at 7.3 patches (one seed, docs/runs/patchdrop_cifar10).
"""

stages = [
    "cifar10_short_classifier_hr.py",
    "cifar10_short_classifier_lr.py",
    "cifar10_short_pretrain.py",
    "cifar10_short_finetune.py",
    "cifar10_short_twostream.py",
    "cifar10_short_sweep.py",
]
