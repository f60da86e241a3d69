"""Analyse trainings: curves, throughput, confusion matrices, a table of all runs.

python tools/analyze.py curves work_dirs/dge/quick work_dirs/dge/dense_quick --out curves.png
python tools/analyze.py throughput work_dirs/dge/quick
python tools/analyze.py confusion configs/dge/quick.py work_dirs/dge/quick
python tools/analyze.py runs
"""

from __future__ import annotations

import argparse
import sys

from patchreg.analysis import analyses
from patchreg.utils.errors import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Analyse trainings: curves, throughput, confusion matrices, a table of all runs."
    )
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    found = analyses()
    for name, module in found.items():
        module.add_arguments(names.add_parser(name, help=module.HELP))
    arguments = parser.parse_args()
    print(found[arguments.name].run(arguments))


if __name__ == "__main__":
    sys.exit(run_tool(main))
