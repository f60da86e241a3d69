"""What the folder of a run tells besides its scalars: config, seed, processes, times, checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mmengine.config import Config

from patchreg.analysis.log import starts_of
from patchreg.runner.build import latest_checkpoint

_TIME = re.compile(r"^(\d{4}/\d\d/\d\d \d\d:\d\d:\d\d) - ", re.MULTILINE)


@dataclass
class RunFacts:
    """What is known about a run; None where nothing tells.

    Args:
        config: Name of the config without its ending.
        model: Class of the model.
        seed: Seed of the run.
        batch_size: Images of one process per iteration.
        processes: Processes of the last start.
        max_epochs: Epochs wanted.
        max_iters: Iterations wanted.
        seconds: Time from the first to the last line of the logs, without the time between starts.
        checkpoint: Newest checkpoint.
    """

    config: str | None = None
    model: str | None = None
    seed: int | None = None
    batch_size: int | None = None
    processes: int | None = None
    max_epochs: int | None = None
    max_iters: int | None = None
    seconds: float | None = None
    checkpoint: Path | None = None


def facts_of(folder: Path) -> RunFacts:
    """Read what the folder of a run tells; what is missing or unreadable there stays None.

    Args:
        folder: Work dir; for a file of scalars nothing is known.
    """
    facts = RunFacts()
    if not folder.is_dir():
        return facts
    config = _config_of(folder, facts)
    facts.model = _part(config, "model", "type")
    facts.seed = _part(config, "randomness", "seed")
    facts.batch_size = _part(config, "train_dataloader", "batch_size")
    facts.max_epochs = _part(config, "train_cfg", "max_epochs")
    facts.max_iters = _part(config, "train_cfg", "max_iters")
    for start in starts_of(folder):
        _read_log(start, facts)
    newest = latest_checkpoint(folder)
    facts.checkpoint = Path(newest) if newest else None
    return facts


def _config_of(folder: Path, facts: RunFacts) -> Any:
    """Return the config that the last start of a run has left in its folder, or None."""
    found = sorted(folder.glob("*.py"), key=lambda item: item.stat().st_mtime_ns)
    if not found:
        return None
    facts.config = found[-1].stem
    try:
        return Config.fromfile(found[-1], import_custom_modules=False)
    # A file that somebody has edited may fail in any way; the table then says less.
    except Exception:
        return None


def _part(config: Any, *keys: str) -> Any:
    value = config
    for key in keys:
        if not isinstance(value, Mapping | Config):
            return None
        value = value.get(key)
    return value


def _read_log(start: Path, facts: RunFacts) -> None:
    """Add the time of one start, and what its first line says."""
    log = start / f"{start.name}.log"
    if not log.is_file():
        return
    text = log.read_text(errors="replace")
    times = [datetime.strptime(time, "%Y/%m/%d %H:%M:%S") for time in _TIME.findall(text)]
    if times:
        facts.seconds = (facts.seconds or 0.0) + (times[-1] - times[0]).total_seconds()
    for name in ("seed", "processes"):
        told = re.search(rf"\b{name} (\d+)", text)
        if told:
            setattr(facts, name, int(told.group(1)))
