"""Curves of what runs have logged, several runs in one picture."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from patchreg.analysis.log import RunLog, read_runs
from patchreg.pictures import check_out
from patchreg.utils.draw import save_figure
from patchreg.utils.errors import ConfigError, did_you_mean

HELP = "curves of losses, accuracies, ratios, rates; several runs in one picture"

UNITS = {
    "top1": "%",
    "top5": "%",
    "time": "s / iteration",
    "data_time": "s / iteration",
    "memory": "MiB",
    "cost/macs": "GMACs",
    "cost/macs_min": "GMACs",
    "cost/macs_max": "GMACs",
    "cost/dense_macs": "GMACs",
    "cost/ratio": "of dense MACs",
}
"""Units by key, or by its end behind the last `/` or `_`."""
_STROKES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
_TIMES = ("time", "data_time")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        parser: Where to add them.
    """
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="work dir of a run, folder of several, or file of JSON lines",
    )
    parser.add_argument(
        "--keys",
        nargs="+",
        metavar="KEY",
        help="scalars to draw, e.g. loss accuracy/top1 lr (default: loss, first metric, ratio, lr)",
    )
    parser.add_argument("--out", default="curves.png", help="picture to write")


def run(arguments: argparse.Namespace) -> str:
    """Draw the picture; return where it is and what is not in it.

    Args:
        arguments: Parsed options.
    """
    check_out(arguments.out)
    runs, notes = read_runs(arguments.runs)
    keys = list(dict.fromkeys(arguments.keys or usual_keys(runs)))
    check_keys(keys, runs)
    for key in keys:
        lacking = [one.label for one in runs if key not in one.keys()]  # noqa: SIM118
        if lacking:
            where = (
                ", ".join(lacking) if len(lacking) < 4 else f"{len(lacking)} of {len(runs)} runs"
            )
            notes.append(f"'{key}' is not in {where}")
    draw_runs(runs, keys, arguments.out)
    count = f"{len(runs)} run" + "s" * (len(runs) != 1)
    return "\n".join([*notes, f"{count}, {', '.join(keys)}: written to {arguments.out}"])


def usual_keys(runs: Sequence[RunLog]) -> list[str]:
    """Return what is worth a look: the loss, the first metric, a ratio and the learning rate.

    Args:
        runs: At least one run.
    """
    known = list(dict.fromkeys(key for one in runs for key in one.keys()))  # noqa: SIM118
    validated = list(dict.fromkeys(key for one in runs for row in one.val for key in row.values))
    metrics = [key for key in validated if key not in _TIMES and not key.startswith("cost/")]
    losses = [key for key in known if key == "loss"] or [key for key in known if "loss" in key]
    ratios = [key for key in known if key.endswith("ratio")]
    rates = [key for key in known if key == "lr"]
    first = [key for key in metrics if key == "accuracy/top1"] or metrics
    return [*losses[:1], *first[:1], *ratios[:1], *rates] or known[:4]


def check_keys(keys: Sequence[str], runs: Sequence[RunLog]) -> None:
    """Refuse a key that no run has logged.

    Args:
        keys: Names of scalars.
        runs: The runs.

    Raises:
        ConfigError: Names the key, the nearest ones and all that there are.
    """
    known = list(dict.fromkeys(key for one in runs for key in one.keys()))  # noqa: SIM118
    for key in keys:
        if key not in known:
            raise ConfigError(
                f"--keys {key}: no run has logged it.{did_you_mean(key, known)} Logged: "
                + ", ".join(known)
            )


def unit_of(key: str) -> str:
    """Return the unit of a scalar, or an empty text.

    Args:
        key: Its name.
    """
    end = key.rsplit("/", 1)[-1]
    return UNITS.get(key) or UNITS.get(end) or UNITS.get(end.rsplit("_", 1)[-1], "")


def draw_runs(runs: Sequence[RunLog], keys: Sequence[str], path: str) -> None:
    """Draw one panel per scalar and one colour per run; validations have dots.

    The axis counts epochs if every run tells how long one is, else iterations.

    Args:
        runs: At least one run.
        keys: At least one scalar that is logged.
        path: Picture file to write; its folder is made.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    by_epoch = all(one.epoch_length or not one.train for one in runs)
    columns = 2 if len(keys) == 4 else min(len(keys), 3)
    lines = math.ceil(len(keys) / columns)
    below = math.ceil(len(runs) / columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(4.6 * columns, 3.2 * lines + 0.2 * below + 0.2),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    # Ten colours can be told apart; further runs have them again with other strokes.
    palette = plt.get_cmap("tab10")
    looks = [
        dict(color=palette(number % 10), linestyle=_STROKES[number // 10 % len(_STROKES)])
        for number in range(len(runs))
    ]
    handles: dict[str, Any] = {}
    for axis, key in zip(axes.flat, keys, strict=False):
        both = False
        for one, look in zip(runs, looks, strict=True):
            trained = one.curve(key, validation=False, by_epoch=by_epoch)
            # The times of a validation are those of another loop.
            tested = [] if key in _TIMES and trained else one.curve(key, True, by_epoch)
            both |= bool(trained and tested)
            for points, marker in ((trained, None), (tested, "o")):
                if points:
                    (line,) = axis.plot(
                        *zip(*points), **look, marker=marker, markersize=4.5, linewidth=1.4
                    )
                    handles.setdefault(one.label, line)
        unit = unit_of(key)
        axis.set_title(f"{key} (dots: validation)" if both else key, fontsize=11)
        axis.set_ylabel(unit, fontsize=10)
        axis.set_xlabel("epoch" if by_epoch else "iteration", fontsize=10)
        axis.set_xlim(left=0)
        if by_epoch and axis.get_xlim()[1] > 4:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
        _scale(axis, key)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=columns,
        fontsize=9,
        frameon=False,
    )
    save_figure(figure, path)


def _scale(axis: Any, key: str) -> None:
    """Keep small curves readable beside large ones: rates on a log scale, times without pauses."""
    values = [np.asarray(line.get_ydata(), dtype=float) for line in axis.get_lines()]
    if key == "lr":
        highest = [float(value.max()) for value in values]
        if min(highest) > 0 and max(highest) > 20 * min(highest):
            axis.set_yscale("log")
    if key in _TIMES:
        together = np.concatenate(values)
        limit = 2 * float(np.percentile(together, 95))
        above = int((together > limit).sum())
        if above and together.max() > 3 * limit:
            axis.set_ylim(0, limit)
            axis.set_title(f"{key} ({above} pauses lie above)", fontsize=11)
