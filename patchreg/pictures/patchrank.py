"""Accuracy from the best k patches, of one or several runs."""

from __future__ import annotations

import argparse

from patchreg.pictures import check_out
from patchreg.runner.patchrank import draw_patchrank

HELP = {"patchrank": "accuracy over the number of patches, from tables of PatchRankLoop"}


def add_arguments(kind: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        kind: "patchrank".
        parser: Where to add them.
    """
    parser.add_argument("tables", nargs="+", help="patchrank.csv of one or several runs")
    parser.add_argument("--out", default="patchrank.png", help="picture to write")


def run(kind: str, arguments: argparse.Namespace) -> str:
    """Draw the picture and say where it is.

    Args:
        kind: "patchrank".
        arguments: Parsed options.
    """
    check_out(arguments.out)
    draw_patchrank(arguments.tables, arguments.out)
    return f"written to {arguments.out}"
