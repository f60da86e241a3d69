"""All runs below a folder in one table: how far they are, how good, how long, how large."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchreg.analysis.facts import RunFacts, facts_of
from patchreg.analysis.log import RunLog, read_runs, run_folders, starts_of
from patchreg.utils.errors import ConfigError, DataError, MissingFileError, did_you_mean
from patchreg.utils.tables import text_table, write_csv

HELP = "table of all runs below a folder: state, epochs, best and last metric, time, size"

RECENT = 600.0
"""Seconds without a written file after which a run that is not finished counts as stopped."""
_NO_METRIC = ("time", "data_time", "eta")
_LOWER = ("loss", "error", "macs", "ratio")


@dataclass
class Summary:
    """What the table says about a run; None where nothing tells.

    Args:
        run: Its folder, relative to where it was looked for.
        config: Name of its config.
        model: Class of its model.
        seed: Seed.
        state: `finished`, `stopped`, `running?`, `evaluated`, or `no scalars`.
        unit: `epochs` or `iterations`, in which `done` and `planned` count.
        done: How far it is.
        planned: How far it shall come.
        metric: Name of the metric.
        best: Its best value.
        best_at: Epoch, or iteration, of that.
        last: Its last value.
        seconds: Time of all starts together.
        megabytes: Size of the newest checkpoint.
    """

    run: str
    config: str | None = None
    model: str | None = None
    seed: int | None = None
    state: str = "no scalars"
    unit: str = "epochs"
    done: float | None = None
    planned: int | None = None
    metric: str | None = None
    best: float | None = None
    best_at: int | None = None
    last: float | None = None
    seconds: float | None = None
    megabytes: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        parser: Where to add them.
    """
    parser.add_argument(
        "folder", nargs="?", default="work_dirs", help="where the runs are (default work_dirs)"
    )
    parser.add_argument(
        "--metric", help="metric to show (default: accuracy/top1, else the first one of a run)"
    )
    parser.add_argument("--csv", metavar="FILE", help="write the table to a file too")


def run(arguments: argparse.Namespace) -> str:
    """Return the table.

    Args:
        arguments: Parsed options.
    """
    found, notes = summaries(arguments.folder, arguments.metric)
    lines = [table(found), *notes]
    if arguments.csv:
        write_csv(arguments.csv, [vars(one) for one in found])
        lines.append(f"written to {arguments.csv}")
    return "\n".join(lines)


def summaries(root: str | Path, metric: str | None = None) -> tuple[list[Summary], list[str]]:
    """Summarise every run below a folder, in the order in which they were started.

    Args:
        root: Folder to search.
        metric: Metric to show, or None for the leading one of each run.

    Returns:
        The runs, and remarks about damaged lines.

    Raises:
        MissingFileError: The folder does not exist.
        DataError: There is no run in it.
        ConfigError: No run has the metric.
    """
    root = Path(root)
    if not root.is_dir():
        raise MissingFileError(
            f"folder '{root}' does not exist; give the folder below which the runs are"
        )
    found, notes = [], []
    metrics: set[str] = set()
    for folder in run_folders(root):
        try:
            (log, *_), told = read_runs([folder])
            notes += [note for note in told if not note.endswith("no lines of scalars; skipped")]
        except DataError:
            log = RunLog("", folder)
        name = str(folder.relative_to(root)) if folder != root else folder.name
        one, known = summarise(name, log, facts_of(folder), metric)
        found.append(one)
        metrics.update(known)
    if not found:
        raise DataError(
            f"folder '{root}' holds no runs; tools/train.py makes them, as <config>/<time>/vis_data"
        )
    if metric is not None and metric not in metrics:
        raise ConfigError(
            f"--metric {metric}: no run has it.{did_you_mean(metric, metrics)} Known: "
            + (", ".join(sorted(metrics)) or "none")
        )
    return found, notes


def summarise(
    name: str, log: RunLog, facts: RunFacts, metric: str | None = None, now: float | None = None
) -> tuple[Summary, list[str]]:
    """Summarise one run.

    Args:
        name: What it is called in the table.
        log: Its scalars.
        facts: What its folder tells.
        metric: Metric to show, or None for the leading one.
        now: Seconds since the epoch of the clock; by default the time now.

    Returns:
        The summary, and the names of all metrics of the run.
    """
    one = Summary(name, facts.config, facts.model, facts.seed, seconds=facts.seconds)
    if facts.checkpoint is not None:
        one.megabytes = facts.checkpoint.stat().st_size / 1e6
    rows = [(row.step, row.values) for row in log.val]
    written = max((item.stat().st_mtime for item in _files(log.path)), default=0.0)
    recent = (time.time() if now is None else now) - written < RECENT
    tested = {} if log.train or log.val else _tested(log.path)
    if log.train or log.val:
        finished = _progress(one, log, facts)
        one.state = "finished" if finished else "running?" if recent else "stopped"
    elif tested:
        one.state, rows = "evaluated", [(0, tested)]
    elif recent:
        one.state = "running?"
    known = list(dict.fromkeys(key for _, values in rows for key in values))
    known = [key for key in known if key not in _NO_METRIC]
    one.metric = metric if metric is not None else _leading(known)
    shown = [(step, values[one.metric]) for step, values in rows if one.metric in values]
    if shown:
        lower = any(word in str(one.metric) for word in _LOWER)
        sound = [(step, value) for step, value in shown if not math.isnan(value)] or shown
        one.best_at, one.best = (min if lower else max)(sound, key=lambda pair: pair[1])
        one.last = shown[-1][1]
    else:
        one.metric = None
    return one, known


def _progress(one: Summary, log: RunLog, facts: RunFacts) -> bool:
    """Set how far a run is; return whether that is all that was wanted."""
    length = log.epoch_length
    iterations = log.train[-1].iteration if log.train else 0
    saved = facts.checkpoint.stem if facts.checkpoint is not None else ""
    kind, _, number = saved.rpartition("_")
    count = int(number) if number.isdigit() else 0
    if facts.max_iters is not None or (facts.max_epochs is None and not length):
        one.unit, one.planned = "iterations", facts.max_iters
        one.done = float(max(iterations, count if kind == "iter" else 0))
    else:
        one.planned = facts.max_epochs
        # A validation, or a checkpoint, of an epoch tells that it was completed.
        told = [float(row.step) for row in log.val[-1:]]
        told += [float(count)] if kind == "epoch" else []
        if length:
            told += [iterations / length] + ([count / length] if kind == "iter" else [])
        elif log.train:
            told.append(float((log.train[-1].epoch or 1) - 1))
        one.done = max(told, default=0.0)
    return one.planned is not None and one.done >= one.planned - 1e-9


def _files(folder: Path) -> list[Path]:
    """Return the logs of the last start of a run, and what lies directly in its folder."""
    if not folder.is_dir():
        return [folder]
    starts = starts_of(folder)[-1:]
    inner = [item for start in starts for item in start.rglob("*")]
    return [item for item in (*inner, *folder.iterdir()) if item.is_file()]


def _tested(folder: Path) -> dict[str, float]:
    """Return the metrics that the last evaluation has left in a run's folder."""
    for start in reversed(starts_of(folder) if folder.is_dir() else []):
        file = start / f"{start.name}.json"
        if file.is_file():
            try:
                values: Any = json.loads(file.read_text())
            except ValueError:
                continue
            if isinstance(values, dict):
                return {k: float(v) for k, v in values.items() if isinstance(v, (int, float))}
    return {}


def _leading(known: Sequence[str]) -> str | None:
    """Return the metric to show of those that a run has."""
    if "accuracy/top1" in known:
        return "accuracy/top1"
    right = [key for key in known if "accuracy" in key or "top1" in key]
    own = [key for key in known if not key.startswith("cost/")]
    return next(iter(right or own or known), None)


def table(found: Sequence[Summary]) -> str:
    """Return the runs as text.

    Args:
        found: At least one run.
    """
    header = (
        "run",
        "config",
        "state",
        "metric",
        "seed",
        "done",
        "best",
        "at",
        "last",
        "time",
        "MB",
    )
    rows = []
    for one in found:
        rows.append(
            (
                one.run,
                one.config or "-",
                one.state,
                one.metric or "-",
                _text(one.seed),
                _share(one),
                _text(one.best, ".4g"),
                _text(one.best_at) if one.state != "evaluated" else "-",
                _text(one.last, ".4g"),
                _duration(one.seconds),
                _text(one.megabytes, ".1f"),
            )
        )
    return text_table(header, rows, left=4)


def _text(value: float | None, form: str = "") -> str:
    return "-" if value is None else format(value, form)


def _share(one: Summary) -> str:
    if one.done is None:
        return "-"
    # Rounded down, so that only what is complete looks complete.
    text = f"{math.floor(10 * one.done) / 10:g}"
    if one.planned is not None:
        text += f" of {one.planned}"
    return text + " it" * (one.unit == "iterations")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
