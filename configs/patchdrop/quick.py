"""PatchDrop on CIFAR-10 in minutes: classifier, policy, both together, and the baselines.

    python tools/train.py configs/patchdrop/quick.py

Hardware and hours: 2 CPU cores, 10 minutes.
Expected: classifier 80.5 top-1, policy alone 50.7 at 6.8 patches (one seed, this folder's page).
"""

stages = ["quick_classifier.py", "quick_pretrain.py", "quick_finetune.py", "quick_sweep.py"]
