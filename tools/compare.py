"""Compare trained models on the same test images and machine.

python tools/compare.py --run "dense twin" configs/dge/dense_quick.py work_dirs/dge/dense_quick \
    --run DGE configs/dge/quick.py work_dirs/dge/quick model.backbone.eval_path=dense
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction

from patchreg.runner.compare import Entry, compare, table, write_csv
from patchreg.utils.errors import ConfigError, run_tool


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare trained models: accuracy, cost and speed."
    )
    parser.add_argument(
        "--run",
        action="append",
        nargs="+",
        required=True,
        metavar="LABEL CONFIG CHECKPOINT [KEY=VALUE ...]",
        help="one row of the table; repeat for each model",
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument(
        "--batch-size", type=int, default=128, help="images per timed batch (default 128)"
    )
    parser.add_argument("--out", default="work_dirs/compare", help="folder of comparison.csv")
    return parser.parse_args()


def entry_of(words: list[str]) -> Entry:
    if len(words) < 3:
        raise ConfigError(
            f"--run {' '.join(words)}: expected LABEL CONFIG CHECKPOINT [KEY=VALUE ...]"
        )
    options = {}
    for word in words[3:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"--run: '{word}' is not KEY=VALUE")
        options[key] = DictAction._parse_iterable(value)
    return Entry(words[0], words[1], words[2], options)


def main() -> None:
    arguments = parse_arguments()
    rows, how = compare(
        [entry_of(words) for words in arguments.run], arguments.rounds, arguments.batch_size
    )
    print(table(rows))
    print(how)
    path = Path(arguments.out) / "comparison.csv"
    write_csv(rows, path)
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
