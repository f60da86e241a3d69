"""How fast runs were: images and iterations per time, and the share of loading."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from patchreg.analysis.facts import facts_of
from patchreg.analysis.log import Row, RunLog, read_runs
from patchreg.utils.errors import ConfigError, DataError
from patchreg.utils.tables import text_table

HELP = "images/s, s/iteration and the share of loading of runs, from their logs"


@dataclass
class Throughput:
    """Speed of one run.

    Args:
        label: Name of the run.
        seconds: Seconds per iteration at the 10th, 50th and 90th percentile of the logged rows.
        data_share: Median share of an iteration in which the data is waited for, or None.
        batch: Images of all processes per iteration, or None.
        rows: Logged rows that count; each is the mean of the iterations before it.
        left_out: Rows of the warm-up.
    """

    label: str
    seconds: tuple[float, float, float]
    data_share: float | None
    batch: int | None
    rows: int
    left_out: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        parser: Where to add them.
    """
    parser.add_argument("runs", nargs="+", metavar="RUN", help="work dir, or file of JSON lines")
    parser.add_argument(
        "--warmup",
        type=int,
        default=50,
        help="iterations to leave out after each start of a run (default 50)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help="images per iteration of all processes, for logs without their config",
    )


def run(arguments: argparse.Namespace) -> str:
    """Return a table of the runs.

    Args:
        arguments: Parsed options.
    """
    if arguments.warmup < 0:
        raise ConfigError(f"--warmup {arguments.warmup}: expected 0 iterations or more")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise ConfigError(f"--batch-size {arguments.batch_size}: expected at least 1")
    runs, notes = read_runs(arguments.runs)
    found = []
    for log in runs:
        if not any("time" in row.values for row in log.train):
            notes.append(f"'{log.label}' has no times of training; skipped")
            continue
        found.append(measure(log, arguments.warmup, arguments.batch_size))
    if not found:
        raise DataError(
            "none of the runs has times of training ('time' in its rows); the hook IterTimerHook writes "
            "them, compact copies of a log may lack them"
        )
    return "\n".join([table(found), *notes])


def measure(log: RunLog, warmup: int = 50, batch: int | None = None) -> Throughput:
    """Measure one run.

    Args:
        log: Its log, with times.
        warmup: Iterations to leave out after each start.
        batch: Images per iteration of all processes, where config and log of the run do not say.

    Raises:
        DataError: Nothing is left after the warm-up.
    """
    timed = [row for row in log.train if "time" in row.values]
    kept = after_warmup(timed, warmup, log.interval or 0)
    if not kept:
        raise DataError(
            f"'{log.label}': none of its {len(timed)} rows with times lies behind the first {warmup} "
            "iterations of a start; give a smaller --warmup"
        )
    facts = facts_of(log.path)
    if facts.batch_size:
        batch = facts.batch_size * (facts.processes or 1)
    times = np.array([row.values["time"] for row in kept])
    shares = [
        row.values["data_time"] / row.values["time"]
        for row in kept
        if "data_time" in row.values and row.values["time"] > 0
    ]
    low, middle, high = (float(value) for value in np.percentile(times, (10, 50, 90)))
    return Throughput(
        label=log.label,
        seconds=(low, middle, high),
        data_share=float(np.median(shares)) if shares else None,
        batch=batch,
        rows=len(kept),
        left_out=len(timed) - len(kept),
    )


def after_warmup(rows: Sequence[Row], warmup: int, interval: int) -> list[Row]:
    """Return the rows that lie behind the first iterations of their start.

    Args:
        rows: Training rows.
        warmup: Iterations to leave out.
        interval: Iterations between two rows: a start has begun so far before its first row.
    """
    begin: dict[int, int] = {}
    for row in rows:
        begin.setdefault(row.start, row.iteration - interval)
    return [row for row in rows if row.iteration - begin[row.start] > warmup]


def table(found: Sequence[Throughput]) -> str:
    """Return the runs as text.

    Args:
        found: At least one run.
    """
    header = ("run", "images/s", "s/iteration", "p10", "p90", "data", "batch", "rows", "left out")
    rows = []
    for one in found:
        low, middle, high = one.seconds
        rows.append(
            (
                one.label,
                f"{one.batch / middle:.1f}" if one.batch else "-",
                *(f"{value:.4f}" for value in (middle, low, high)),
                "-" if one.data_share is None else f"{100 * one.data_share:.1f} %",
                str(one.batch or "-"),
                str(one.rows),
                str(one.left_out),
            )
        )
    text = text_table(header, rows)
    text += (
        "\nmedian and percentiles over logged rows, each the mean of the iterations before it; data: median "
        "share of an iteration that waits for the loader"
    )
    if any(one.batch is None for one in found):
        text += "\nimages/s needs --batch-size where a log lies without its config"
    return text
