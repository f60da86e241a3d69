"""Converting checkpoints between layouts: what tools/convert.py does, for use from Python too.

A method that reads or writes foreign checkpoints has a module `convert` in its package with
`LAYOUTS` (name -> what it is), `ALLOWED` (classes of plain values in foreign files), `OPTIONS` (flag
-> arguments of `add_argument`) and `convert(loaded, path, to, layout, **options)`, which returns the
new checkpoint and a report. The report is a dict of names by what happened to them. A module with
`read(path)` reads the file itself. Converters of no method lie in `patchreg.converters`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from patchreg.converters import shared_converters
from patchreg.registry import method_modules
from patchreg.utils.errors import CheckpointError, ConfigError
from patchreg.utils.files import write_through
from patchreg.utils.weights import container_of, load_file, state_dict_of

_SHOWN = 3


def converters() -> dict[str, ModuleType]:
    """Return the converters by name: those of the methods, and those that belong to none."""
    return {**method_modules("convert"), **shared_converters()}


def convert_file(
    converter: ModuleType,
    source: str,
    out: str,
    to: str,
    layout: str = "auto",
    *,
    report_path: str | None = None,
    force: bool = False,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint file; writes all or nothing.

    Args:
        converter: One of `converters()`.
        source: File to read.
        out: File to write; `.safetensors` gets the bare weights.
        to: Layout wanted.
        layout: Layout of `source`, or `auto`.
        report_path: Where the full report goes as JSON, or None.
        force: Whether files that exist may be replaced.
        options: Further arguments of the method's `convert`.

    Returns:
        The report.

    Raises:
        ConfigError: A file to write exists, or its folder does not.
        MissingFileError: There is no `source`.
        CheckpointError: `source` is damaged, is another model, or cannot be converted as asked.
    """
    for target in filter(None, (out, report_path)):
        if os.path.exists(target) and (not force or os.path.isdir(target)):
            raise ConfigError(f"'{target}' exists; choose another name, or replace it with --force")
        if not Path(target).absolute().parent.is_dir():
            raise ConfigError(f"the folder of '{target}' does not exist; make it first")
    if hasattr(converter, "read"):
        loaded = converter.read(source)
    else:
        loaded = load_file(source, allowed=converter.ALLOWED)
    checkpoint, report = converter.convert(loaded, source, to, layout, **(options or {}))
    report = {"source": source, "out": out, **report}
    if out.endswith(".safetensors"):
        from safetensors.torch import save_file

        state = {key: value.contiguous() for key, value in state_dict_of(checkpoint, out).items()}
        report["not_carried"] += [key for key in checkpoint if key != container_of(checkpoint)]
        _write(out, lambda path: save_file(state, path, metadata={"format": "pt"}))
    else:
        _write(out, lambda path: torch.save(checkpoint, path))
    if report_path is not None:
        text = json.dumps(report, indent=1) + "\n"
        _write(report_path, lambda path: Path(path).write_text(text, encoding="ascii"))
    return report


def _write(target: str, write: Callable[[str], Any]) -> None:
    try:
        write_through(target, write)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"'{target}' cannot be written: {error}") from error


def summary(report: Mapping[str, Any]) -> str:
    """Return the report in a few lines: counts, and the first names of each kind.

    Args:
        report: What `convert_file` returned.
    """
    lines = [f"{report['source']} ({report['from']}) -> {report['out']} ({report['to']})"]
    for key, value in report.items():
        if isinstance(value, list):
            shown = ", ".join(value[:_SHOWN]) + (", ..." if len(value) > _SHOWN else "")
            lines.append(f"  {key.replace('_', ' '):12s}{len(value):5d}  {shown}".rstrip())
    for part, config in report["model"].items():
        arguments = ", ".join(f"{key}={value!r}" for key, value in config.items())
        lines.append(f"  {part}=dict({arguments})")
        arch = config.get("arch")
        if isinstance(arch, Mapping) and "num_heads" in arch and arch["num_heads"] is None:
            lines.append(
                "  num_heads is not in a file: fill it in as in the config of the training"
            )
    return "\n".join(lines)
