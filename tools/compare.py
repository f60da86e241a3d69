"""Compare trained models on the same test images and machine: a table, curves, and what each looked at.

python tools/compare.py --quick
python tools/compare.py --run "dense twin" configs/dge/dense_quick.py work_dirs/dge/dense_quick \
    --run DGE configs/dge/quick.py work_dirs/dge/quick sweep.model.budget=0.5,0.7,1.0
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction

from patchreg.runner.compare import BATCH, ROUNDS, Entry, compare, declared, table, write_csv
from patchreg.runner.report import write_report
from patchreg.utils.errors import ConfigError, run_tool

SWEEP = "sweep."


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare trained models: accuracy, cost, pixels looked at and speed."
    )
    parser.add_argument(
        "--run",
        action="append",
        nargs="+",
        default=[],
        metavar="LABEL CONFIG CHECKPOINT [KEY=VALUE ...]",
        help="a model; repeat for each. CHECKPOINT '-' for a model that loads its parts by itself. "
        "budget=VALUE is the mean multiply-accumulates of an early exit; sweep.KEY=V1,V2 makes a row for "
        "each value",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the models whose configs say compare=dict(...), with the checkpoints that come along",
    )
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"timed rounds (default {ROUNDS})"
    )
    parser.add_argument(
        "--batch-size", type=int, default=BATCH, help=f"images per timed batch (default {BATCH})"
    )
    parser.add_argument(
        "--images", type=int, help="test images, the same share of each class (default all)"
    )
    parser.add_argument(
        "--out", default="work_dirs/compare", help="folder of comparison.csv, .png and .html"
    )
    return parser.parse_args()


def entry_of(words: list[str]) -> Entry:
    if len(words) < 3:
        raise ConfigError(
            f"--run {' '.join(words)}: expected LABEL CONFIG CHECKPOINT [KEY=VALUE ...]"
        )
    options = {}
    knob: str | None = None
    values: list = []
    for word in words[3:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"--run: '{word}' is not KEY=VALUE")
        if key.startswith(SWEEP):
            if knob is not None:
                raise ConfigError(f"--run {words[0]}: one knob at a time, not {knob} and {key}")
            knob = key[len(SWEEP) :]
            values = [DictAction._parse_iterable(part) for part in value.split(",") if part]
        else:
            options[key] = DictAction._parse_iterable(value)
    checkpoint = None if words[2] == "-" else words[2]
    return Entry(words[0], words[1], checkpoint, options, knob, values)


def main() -> None:
    arguments = parse_arguments()
    entries = declared() if arguments.quick else []
    entries += [entry_of(words) for words in arguments.run]
    if not entries:
        raise ConfigError("nothing to compare: name runs with --run, or take --quick")
    found = compare(entries, arguments.rounds, arguments.batch_size, arguments.images)
    print(table(found.rows))
    print(found.how)
    folder = Path(arguments.out)
    write_csv(found.rows, folder / "comparison.csv")
    page = write_report(found, folder)
    print(f"written to {folder}: comparison.csv, comparison.png, looks.png, {page.name}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
