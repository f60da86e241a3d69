"""Draw what a model looks at.

python tools/visualize.py granularity test configs/dge/quick.py work_dirs/dge/quick --out granularity.png
"""

from __future__ import annotations

import argparse
import sys

from patchreg.pictures import pictures
from patchreg.utils.errors import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what a model looks at.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    found = pictures()
    for kind, module in found.items():
        module.add_arguments(kind, kinds.add_parser(kind, help=module.HELP[kind]))
    arguments = parser.parse_args()
    print(found[arguments.kind].run(arguments.kind, arguments))


if __name__ == "__main__":
    sys.exit(run_tool(main))
