"""Write docs/zoo.md and docs/configs.md from metafiles and registries, or check them.

python tools/zoo.py
python tools/zoo.py --check
"""

from __future__ import annotations

import argparse
import sys

from patchreg.runner.zoo import check, leaves, write
from patchreg.utils.errors import run_tool


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write the table of all configs and the reference of all classes."
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing; fail when a page is old, or a metafile and its configs differ",
    )
    return parser.parse_args()


def main() -> None:
    if parse_arguments().check:
        check()
        print(f"{len(leaves())} configs agree with their metafiles, and the pages with both")
    else:
        print(f"written: {', '.join(write())}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
