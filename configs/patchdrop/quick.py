"""PatchDrop on CIFAR-10 in minutes: classifier, policy, both together, and the baselines.

    python tools/train.py configs/patchdrop/quick.py

Hardware and hours: 2 CPU cores, 10 minutes.
Expected: 70.5 top-1 at 5.4 of 16 patches, random patches 59.2 (mean of 3 seeds, this folder's page).
"""

stages = ["quick_classifier.py", "quick_pretrain.py", "quick_finetune.py", "quick_sweep.py"]
