"""Draw what the pipeline of a config feeds its model, image by image.

python tools/browse_data.py configs/pwself/quick.py --out views.png
"""

from __future__ import annotations

import argparse
import sys

from patchreg.pictures import check_out
from patchreg.runner.browse import SPLITS, browse, describe, draw
from patchreg.utils.errors import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw images as they are stored, after the pipeline, and as the model gets them."
    )
    parser.add_argument("config", help="config file, e.g. configs/pwself/quick.py")
    parser.add_argument("--split", choices=SPLITS, help="default: train where the config has it")
    parser.add_argument("--count", type=int, default=4, help="images (default 4)")
    parser.add_argument("--seed", type=int, help="seed of the run (default: that of the config)")
    parser.add_argument("--out", default="data.png", help="picture to write")
    arguments = parser.parse_args()
    check_out(arguments.out)
    found = browse(arguments.config, arguments.split, arguments.count, arguments.seed)
    draw(found, arguments.out)
    print(describe(found))
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
