"""Put data sets and real weights in place: python tools/prepare_data.py cifar10."""

import argparse
import sys

from patchreg.datasets.prepare import preparers
from patchreg.utils.errors import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Put data sets and real weights in place. Nothing is ever overwritten."
    )
    sets = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    found = preparers()
    for name, module in found.items():
        module.add_arguments(name, sets.add_parser(name, help=module.HELP[name]))
    arguments = parser.parse_args()
    print(found[arguments.name].run(arguments.name, arguments))


if __name__ == "__main__":
    sys.exit(run_tool(main))
