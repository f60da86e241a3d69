"""Several leaves in a row: each its own run in its own folder, checkpoints handed forward, resumable."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config

from patchreg.runner.build import default_work_dir, latest_checkpoint, load_config
from patchreg.runner.launch import init_processes
from patchreg.runner.run import evaluate, process_group, train
from patchreg.utils.errors import ConfigError, MissingFileError
from patchreg.utils.files import write_safely

_RECORD = "stages.json"


def run_stages(
    config: Config,
    *,
    resume: bool = False,
    dry_run: bool = False,
    **shared: Any,
) -> None:
    """Run the leaves that a config lists under `stages`, in order, and print what each reached.

    A leaf that trains is trained, one that only evaluates is evaluated. A checkpoint that a leaf expects
    below the usual work dir of an earlier leaf is taken from where that stage wrote. All leaves are checked
    before the first one runs.

    Args:
        config: Config with `stages`, paths of leaves relative to its own file.
        resume: Whether to skip finished stages and continue the one that was interrupted.
        dry_run: Whether to print the flow of every stage and stop.
        shared: Further arguments of `train` (amp, auto_scale_lr, launcher, seed).

    Raises:
        MissingFileError: A leaf does not exist.
        ConfigError: A leaf is wrong, or lists stages itself.
    """
    own = Path(config.filename).parent
    leaves = [os.path.relpath(own / leaf) for leaf in config.stages]
    folder = Path(config.work_dir)
    moved: dict[str, str] = {}
    plan: list[tuple[str, str, dict[str, str], bool]] = []
    for leaf in leaves:
        if not os.path.isfile(leaf):
            raise MissingFileError(f"{config.filename}: the stage '{leaf}' does not exist")
        target = str(folder / Path(leaf).stem)
        checked = load_config(leaf, work_dir=target, moved=moved)
        if "stages" in checked:
            raise ConfigError(
                f"{config.filename}: the stage '{leaf}' lists stages itself; name its leaves here"
            )
        plan.append((leaf, target, dict(moved), checked.get("train_cfg") is not None))
        moved[default_work_dir(leaf)] = target
    record_path = folder / _RECORD
    record: dict[str, Any] = {}
    if resume and record_path.is_file():
        record = json.loads(record_path.read_text())
    with process_group():
        if not dry_run:
            init_processes(shared.get("launcher", "none"))
        _run(plan, record, record_path, resume, dry_run, shared)


def _run(
    plan: list[tuple[str, str, dict[str, str], bool]],
    record: dict[str, Any],
    record_path: Path,
    resume: bool,
    dry_run: bool,
    shared: dict[str, Any],
) -> None:
    first = int(os.environ.get("RANK", 0)) == 0
    for number, (leaf, target, earlier, trains) in enumerate(plan, 1):
        finished = leaf in record and not dry_run
        if first:
            what = "is finished" if finished else f"-> {target}"
            print(f"stage {number}/{len(plan)}: {leaf} {what}", flush=True)
        if finished:
            continue
        options: dict[str, Any] = dict(work_dir=target, moved=earlier, dry_run=dry_run)
        if trains:
            metrics = train(leaf, resume="auto" if resume else None, **options, **shared)
            result: dict[str, Any] = {"checkpoint": latest_checkpoint(target), "metrics": metrics}
        else:
            used = {key: shared[key] for key in ("launcher", "seed") if key in shared}
            result = {"metrics": evaluate(leaf, **options, **used)}
        if not dry_run and first:
            record[leaf] = result
            write_safely(record_path, json.dumps(record, indent=1).encode())
    if first and not dry_run:
        print(summary({leaf: record[leaf] for leaf, *_ in plan}), flush=True)


def summary(record: dict[str, Any]) -> str:
    """Return what every stage reached: one line per stage, with the metrics of its last evaluation.

    Timings and the extremes of the cost are left out.

    Args:
        record: Result of each stage by its leaf.
    """
    lines = ["all stages are finished"]
    for leaf, result in record.items():
        shown = [
            f"{name} {value:.4g}"
            for name, value in (result.get("metrics") or {}).items()
            if name not in ("time", "data_time", "cost/macs_min", "cost/macs_max")
        ]
        lines.append(f"  {Path(leaf).stem}: " + (", ".join(shown) or "no metrics"))
    return "\n".join(lines)
