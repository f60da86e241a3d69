"""PatchDrop on CIFAR-10 in minutes: classifier, policy, both together, and the baselines.

    python tools/train.py configs/patchdrop/quick.py

Hardware and hours: 2 CPU cores, 10 minutes.
Expected: 77.1 top-1 at 9.0 patches, random patches 69.5 (one seed, this folder's page).
"""

stages = ["quick_classifier.py", "quick_pretrain.py", "quick_finetune.py", "quick_sweep.py"]
