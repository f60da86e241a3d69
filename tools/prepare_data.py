"""Fetch, check and convert data sets: python tools/prepare_data.py {cifar10,cifar100,imagenet} "
"--help."""

import argparse
import sys

from patchreg.datasets import prepare
from patchreg.utils.errors import run_tool


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Put data sets in place. Nothing is ever overwritten."
    )
    sets = parser.add_subparsers(dest="dataset", required=True)
    for name in ("cifar10", "cifar100"):
        cifar = sets.add_parser(name, help=f"fetch {name}, check it, store it memory-mapped")
        cifar.add_argument(
            "--out", default="data", help=f"folder for data sets; makes <out>/{name}"
        )
        cifar.add_argument("--source", default="auto", choices=prepare.SOURCES, help="where from")
    imagenet = sets.add_parser(
        "imagenet", help="sort flat validation images into class folders, by links"
    )
    imagenet.add_argument("--val-images", required=True, help="folder with ILSVRC2012_val_*.JPEG")
    imagenet.add_argument(
        "--out", required=True, help="root of the data set; makes <out>/val/<wnid>/"
    )
    imagenet.add_argument(
        "--labels",
        help="devkit folder, LOC_val_solution.csv, folder of XML files, or '<image> <wnid>' lines",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.dataset == "imagenet":
        print(prepare.prepare_imagenet(args.val_images, args.out, args.labels))
    else:
        print(prepare.prepare_cifar(args.dataset, args.out, args.source))


if __name__ == "__main__":
    sys.exit(run_tool(main))
