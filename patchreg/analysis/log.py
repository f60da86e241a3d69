"""What a run has logged: its scalars, with resumed parts and stages put in order."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from patchreg.utils.errors import DataError, MissingFileError, did_you_mean

START = re.compile(r"\d{8}_\d{6}(_\d+)?")
"""Folder of one start of a run, named by its time."""
_BOOKKEEPING = ("epoch", "iter", "step")


@dataclass
class Row:
    """Scalars of one step.

    Args:
        step: Step as logged: an iteration in training, an epoch or iteration in validation.
        iteration: Training iterations done; for a validation those of the last training row before it.
        start: Which start of the run wrote it, from 0.
        values: Scalars by name.
        epoch: Epoch of a training row, from 1, if it tells.
    """

    step: int
    iteration: int
    start: int
    values: dict[str, float]
    epoch: int | None = None


@dataclass
class RunLog:
    """What one run, or one stage of it, has logged.

    Args:
        label: Short name that tells it from the other runs.
        path: Folder of the run, or the file its scalars were read from.
        train: Rows of the training, by ascending iteration.
        val: Rows of the validations, in order.
    """

    label: str
    path: Path
    train: list[Row] = field(default_factory=list)
    val: list[Row] = field(default_factory=list)

    def keys(self) -> list[str]:
        """Return the names of all scalars, in the order in which they first appear."""
        found: dict[str, None] = {}
        for row in (*self.train, *self.val):
            found.update(dict.fromkeys(row.values))
        return list(found)

    @property
    def interval(self) -> int | None:
        """Iterations between two training rows, or None when there are too few rows to tell."""
        steps = [
            (after.iteration - before.iteration, before.epoch == after.epoch)
            for before, after in zip(self.train, self.train[1:])
        ]
        inside = [gap for gap, same in steps if same]
        gaps = Counter(inside or [gap for gap, _ in steps])
        return gaps.most_common(1)[0][0] if gaps else None

    @property
    def epoch_length(self) -> int | None:
        """Iterations of an epoch, or None when the log does not tell.

        An epoch logs its first row one interval after its begin.
        """
        interval = self.interval
        firsts: dict[int, int] = {}
        for row in self.train:
            if row.epoch is not None:
                firsts.setdefault(row.epoch, row.iteration)
        if interval is None:
            return None
        # A run that was resumed inside an epoch may lack its first row, so the least estimate counts.
        guesses = [(first - interval) / (epoch - 1) for epoch, first in firsts.items() if epoch > 1]
        length = round(min(guesses, default=0))
        possible = length > 0 and all(
            row.iteration <= (row.epoch or 0) * length for row in self.train
        )
        return length if possible else None

    def curve(self, key: str, validation: bool, by_epoch: bool) -> list[tuple[float, float]]:
        """Return the points (x, value) of a scalar.

        Args:
            key: Its name.
            validation: Whether to take it from the validations instead of the training.
            by_epoch: Whether x are epochs, which needs `epoch_length` where there are training rows;
                iterations otherwise.
        """
        length = self.epoch_length
        points = []
        for row in self.val if validation else self.train:
            if key not in row.values:
                continue
            x = float(row.iteration)
            if validation:
                x = float(self._validated_at(row, length))
            points.append((x / length if by_epoch and length else x, row.values[key]))
        return points

    def _validated_at(self, row: Row, length: int | None) -> int:
        """Return the iteration of a validation, whose step is an epoch or an iteration."""
        if not self.train:
            return row.step
        if length is None:
            return row.iteration
        return min((row.step * length, row.step), key=lambda guess: abs(guess - row.iteration))


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[RunLog], list[str]]:
    """Read the logs of runs.

    A path is the work dir of a run, a folder of several (stages, a whole `work_dirs`), or a file of JSON
    lines. Of the rows of one step the last one counts. A resumed run that begins before the end of what is
    logged replaces that end.

    Args:
        paths: At least one path.

    Returns:
        The runs, and remarks about what was skipped.

    Raises:
        MissingFileError: A path does not exist.
        DataError: A path holds no scalars.
    """
    found: list[RunLog] = []
    notes: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            near = [item.name for item in path.parent.glob("*")] if path.parent.is_dir() else []
            raise MissingFileError(f"run '{path}' does not exist.{did_you_mean(path.name, near)}")
        here: list[RunLog] = []
        for place, files in _logs_below(path):
            here += _read(place, files, notes, named=place == path)
        if not here:
            raise DataError(
                f"'{path}' holds no scalars; give the work dir of a run (work_dirs/<method>/<leaf>, with "
                "<time>/vis_data/scalars.json in it), a folder of runs, or a file of JSON lines. A run "
                "writes its first line after default_hooks.logger.interval iterations"
            )
        known = {other.path.resolve() for other in found}
        found += [run for run in here if run.path.resolve() not in known]
    _name(found)
    return found, notes


def starts_of(folder: Path) -> list[Path]:
    """Return the folders of the starts of a run, in the order of time.

    Args:
        folder: Work dir.
    """
    found = [item for item in folder.iterdir() if item.is_dir() and START.fullmatch(item.name)]
    return sorted(found, key=lambda item: (item.name[:15], int(item.name[16:] or 1)))


def run_folders(root: Path) -> list[Path]:
    """Return every work dir at or below a folder, in the order in which they were started.

    Args:
        root: Where to look.
    """
    found = []
    for place, folders, _ in os.walk(root):
        starts = [name for name in folders if START.fullmatch(name)]
        if starts:
            found.append((min(starts), Path(place)))
        folders[:] = [name for name in folders if name not in starts and not name.startswith(".")]
    return [folder for _, folder in sorted(found)]


def _scalars_of(start: Path) -> list[Path]:
    """Return the file of scalars of one start, if it has one."""
    folder = start if start.name == "vis_data" else start / "vis_data"
    if (folder / "scalars.json").is_file():
        return [folder / "scalars.json"]
    return sorted(folder.glob("*.json"))[:1]


def _logs_below(path: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield work dirs, or single files, with the files of their starts."""
    if path.is_file():
        yield path, [path]
        return
    if path.name == "vis_data" or (path / "vis_data").is_dir():
        yield path, _scalars_of(path)
        return
    for folder in run_folders(path):
        yield folder, [file for start in starts_of(folder) for file in _scalars_of(start)]
    for file in sorted(path.glob("*.json*")):
        if file.suffix in (".json", ".jsonl") and file.name != "stages.json":
            yield file, [file]


def _read(place: Path, files: Sequence[Path], notes: list[str], named: bool) -> list[RunLog]:
    """Read the starts of one run; more than one answer when the rows name stages."""
    runs: dict[str, tuple[RunLog, list[tuple[bool, Row]]]] = {}
    for start, file in enumerate(files):
        damaged: list[str] = []
        rows = list(_rows(file, damaged))
        if rows:
            notes += damaged
        elif named:
            raise DataError(
                f"'{file}' holds no scalars: expected one JSON object with 'step' per line, as "
                f"<time>/vis_data/scalars.json of a run has ({len(damaged)} lines are something else)"
            )
        else:
            notes.append(f"'{file}' holds no lines of scalars; skipped")
        for stage, values in rows:
            run, kept = runs.setdefault(stage, (RunLog(stage, place), []))
            _keep(kept, values, start)
    for run, kept in runs.values():
        run.train = [row for trained, row in kept if trained]
        run.val = [row for trained, row in kept if not trained]
    return [run for run, _ in runs.values()]


def _rows(file: Path, damaged: list[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield stage and numbers of each line; report lines that are something else."""
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            damaged.append(f"'{file}' line {number} is damaged ({error.msg}); skipped")
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            damaged.append(f"'{file}' line {number} has no 'step'; skipped")
            continue
        stage = row.get("stage", "")
        numbers = {
            key: value
            for key, value in row.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        yield str(stage), numbers


def _keep(kept: list[tuple[bool, Row]], values: dict[str, float], start: int) -> None:
    """Add a row behind those before it, and drop the ones that it replaces."""
    step = int(values["step"])
    trained = "iter" in values
    if trained:
        iteration = int(values["iter"])
        while kept and kept[-1][1].iteration >= iteration:
            kept.pop()
    else:
        while kept and not kept[-1][0] and kept[-1][1].step >= step:
            kept.pop()
        iteration = kept[-1][1].iteration if kept else 0
    scalars = {key: float(value) for key, value in values.items() if key not in _BOOKKEEPING}
    epoch = int(values["epoch"]) if "epoch" in values else None
    kept.append((trained, Row(step, iteration, start, scalars, epoch)))


def _name(runs: Sequence[RunLog]) -> None:
    """Label every run by as much of the end of its path as tells it from the others."""
    parts = {}
    for run in runs:
        whole = run.path.absolute()
        parts[run.path] = (whole.with_suffix("") if run.path.is_file() else whole).parts
    count = 2 if len(parts) == 1 else 1
    longest = max(map(len, parts.values()))
    while len({path[-count:] for path in parts.values()}) < len(parts) and count < longest:
        count += 1
    for run in runs:
        place = "/".join(parts[run.path][-count:])
        run.label = f"{place}: {run.label}" if run.label else place
