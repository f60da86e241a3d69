"""Train the model of a config: `python tools/train.py configs/dge/quick.py`."""

from __future__ import annotations

import argparse
import sys

from mmengine.config import DictAction

from patchreg.runner.run import train
from patchreg.utils.errors import run_tool


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the model of a config.")
    parser.add_argument("config", help="config file, e.g. configs/dge/quick.py")
    parser.add_argument(
        "--work-dir", help="where logs and checkpoints go (default: work_dirs/<method>/<leaf>)"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        help="continue a run: from the newest checkpoint of the work dir, or from the file given",
    )
    parser.add_argument(
        "--amp", action="store_true", help="mixed precision (bfloat16 where the device has it)"
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate to the real batch size (auto_scale_lr of the config)",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        help="overrides, e.g. train_dataloader.batch_size=64 model.backbone.depth=4",
    )
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument(
        "--seed", type=int, help="seed of the run (default: randomness.seed of the config)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the config, print its flow and stop"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    train(
        arguments.config,
        work_dir=arguments.work_dir,
        resume=arguments.resume,
        amp=arguments.amp,
        auto_scale_lr=arguments.auto_scale_lr,
        options=arguments.cfg_options,
        launcher=arguments.launcher,
        seed=arguments.seed,
        dry_run=arguments.dry_run,
    )


if __name__ == "__main__":
    sys.exit(run_tool(main))
