"""Explain a config: its flow, the files it comes from, its model part by part.

python tools/explain.py configs/dge/quick.py
python tools/explain.py configs/dge/quick.py --diff configs/dge/dense_quick.py
"""

from __future__ import annotations

import argparse
import sys

from patchreg.runner.anatomy import difference, explain
from patchreg.runner.run import train
from patchreg.utils.errors import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Explain a config: files, model part by part, flow with file and line, hooks."
    )
    parser.add_argument("config", help="config file, e.g. configs/dge/quick.py")
    parser.add_argument("--diff", metavar="OTHER", help="show what differs from another config")
    arguments = parser.parse_args()
    if arguments.diff:
        print(difference(arguments.config, arguments.diff))
        return
    print(explain(arguments.config))
    print()
    train(arguments.config, dry_run=True)


if __name__ == "__main__":
    sys.exit(run_tool(main))
