"""Evaluate a checkpoint: `python tools/test.py configs/dge/quick.py work_dirs/dge/quick`."""

from __future__ import annotations

import argparse
import sys

from mmengine.config import DictAction

from patchreg.runner.run import evaluate
from patchreg.utils.errors import run_tool


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Evaluate a checkpoint on the test set of a config."
    )
    parser.add_argument("config", help="config file, e.g. configs/dge/quick.py")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="checkpoint (default: load_from of the config, or the weights its parts name)",
    )
    parser.add_argument(
        "--work-dir", help="where logs and results go (default: work_dirs/<method>/<leaf>)"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        help="overrides, e.g. test_dataloader.batch_size=64",
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
    evaluate(
        arguments.config,
        arguments.checkpoint,
        work_dir=arguments.work_dir,
        options=arguments.cfg_options,
        launcher=arguments.launcher,
        seed=arguments.seed,
        dry_run=arguments.dry_run,
    )


if __name__ == "__main__":
    sys.exit(run_tool(main))
