"""Draw what a model looks at.

python tools/visualize.py granularity test configs/dge/quick.py work_dirs/dge/quick --out granularity.png
"""

from __future__ import annotations

import argparse
import sys

from patchreg.runner.picture import draw_granularity
from patchreg.utils.errors import run_tool


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw what a model looks at.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    granularity = kinds.add_parser("granularity", help="how finely each region is queried")
    granularity.add_argument(
        "image", help="image file, folder of images, or 'test' for the config's test set"
    )
    granularity.add_argument("config")
    granularity.add_argument("checkpoint", help="checkpoint, or folder of a run for its newest one")
    granularity.add_argument("--out", default="granularity.png", help="picture to write")
    granularity.add_argument(
        "--count", type=int, default=8, help="how many images at most (default 8)"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    draw_granularity(
        arguments.image, arguments.config, arguments.checkpoint, arguments.out, arguments.count
    )
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
