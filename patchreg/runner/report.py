"""A comparison for people: one picture of its curves, one of what was looked at, one page with both.

The page is a single file: pictures are part of it, nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from patchreg.runner.compare import Comparison, Row
from patchreg.utils.draw import draw_looks, draw_panels
from patchreg.utils.files import write_safely

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.25em .6em;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}th{border-bottom:2px solid #888}
tr.best td:first-child{font-weight:600}tr.best td:first-child::after{content:" *";color:#b05}
img{max-width:100%}code{font-size:12px;background:#f4f4f4;padding:.1em .3em;overflow-wrap:anywhere}
details{margin:.2em 0}p.small{color:#555;font-size:13px}
"""


def draw_comparison(rows: Sequence[Row], path: str | Path) -> None:
    """Draw accuracy over cost, over measured time and over the pixels looked at; one curve per label.

    Args:
        rows: Those of a `Comparison`.
        path: Picture file to write; its folder is made.
    """
    axes = {
        "million multiply-accumulates per image": [row.macs / 1e6 for row in rows],
        "measured ms per image": [row.milliseconds for row in rows],
        "share of the pixels sampled": [row.seen for row in rows],
    }
    draw_panels([row.label for row in rows], axes, [row.top1 for row in rows], "top-1 (%)", path)


def write_report(found: Comparison, folder: str | Path, title: str = "Comparison") -> Path:
    """Write `comparison.png`, `looks.png` and the page `comparison.html`.

    Args:
        found: What `compare` returned.
        folder: Folder; it is made.
        title: Heading of the page.

    Returns:
        The page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    curves, looks = folder / "comparison.png", folder / "looks.png"
    draw_comparison(found.rows, curves)
    names = found.classes or [str(label) for label in range(int(found.truth.max()) + 1)]
    draw_looks(
        found.images,
        [names[label] if label < len(names) else str(label) for label in found.truth.tolist()],
        {
            look.name: (
                look.selection,
                [
                    names[label] if label < len(names) else str(label)
                    for label in look.predicted.tolist()
                ],
                (look.predicted == found.truth).tolist(),
            )
            for look in found.looks
        },
        looks,
    )
    page = folder / "comparison.html"
    write_safely(page, _page(found, curves, looks, title).encode())
    return page


def _page(found: Comparison, curves: Path, looks: Path, title: str) -> str:
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="small">{html.escape(found.how)}</p>',
        f'<img alt="accuracy over cost, time and pixels" src="{_inline(curves)}">',
        "<h2>All settings</h2>",
        "<table><tr><th>model</th><th>top-1</th><th>MMACs / image</th><th>of its dense twin</th>"
        "<th>pixels sampled</th><th>ms / image</th><th>speed</th></tr>",
    ]
    for row in found.rows:
        lines.append(
            f"<tr{' class=best' if row.best else ''}><td>{html.escape(row.name)}</td>"
            f"<td>{row.top1:.2f}</td><td>{row.macs / 1e6:.1f}</td><td>{row.mac_ratio:.3f}</td>"
            f"<td>{100 * row.seen:.0f} %</td><td>{row.milliseconds:.3f}</td><td>{row.speed:.2f}x</td></tr>"
        )
    lines += [
        "</table>",
        '<p class="small">* no other row is more accurate in the same time. Speed is against the first row. '
        "Pixels sampled: mean over the image of the resolution at which it was looked at, a coarse view "
        "counting with its share of the pixels; a model that merges or queries tokens coarsely still reads "
        "all pixels once.</p>",
        "<h2>What each looked at</h2>",
        f'<img alt="what each model looked at" src="{_inline(looks)}">',
        '<p class="small">Bright is sampled finely, dark coarsely or not at all; boxes are windows in their '
        "order. Each model at the middle setting of its knob; a red name is a wrong answer.</p>",
        "<h2>Commands</h2>",
        "<p>Each row by itself, from the folder of the checkout:</p>",
    ]
    for row in found.rows:
        lines.append(
            f"<details><summary>{html.escape(row.name)}</summary>"
            f"<code>{html.escape(row.command)}</code></details>"
        )
    return "\n".join([*lines, "</body></html>", ""])


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
