"""Tables: aligned text for people, CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patchreg.utils.files import write_safely


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return rows in columns of equal width.

    Args:
        header: One name per column.
        rows: Cells, as many per row as there are names.
        left: How many columns, from the first one, are aligned to the left; the others hold numbers.
    """
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        line = [
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(line).rstrip())
    return "\n".join(lines)


def write_csv(
    path: str | Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()
) -> None:
    """Write rows as CSV, with their keys in the first line.

    Args:
        path: File to write or replace; its folder is made.
        rows: Values by column; one that a row lacks stays empty.
        columns: Order of the columns; by default that in which the keys first appear.
    """
    names = columns or list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safely(path, text.getvalue().encode())
