"""Results as a picture: one panel per case, a bar for Trunkline and one for each it is compared with.

Invariant: complete in itself, readable on light and dark pages; longer is more, and each panel says whether that is
better.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from benchmarks.report import value_text

WIDTH, NAME, VALUE = 760, 230, 110
"""Of the picture, of the names at the left, of the figures at the right; in pixels."""
BAR, STEP, HEAD = 14, 20, 46
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f } .head { font-weight: 600 } .note { fill: #6a737d }
.own { fill: #1f6feb } .other { fill: #b6bec9 } .goal { stroke: #cf222e; stroke-width: 2; stroke-dasharray: 3 2 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .note { fill: #9198a1 } .other { fill: #57606a } }
"""


def svg(results: list[dict[str, Any]]) -> str:
    """Return the picture."""
    parts: list[str] = []
    top = 10
    for name, rows in _panels(results):
        parts += _panel(name, rows, top)
        top += HEAD + STEP * len(_bars(rows))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" role="img">'
    title = "<title>Trunkline beside hand-written loops and peers</title>"
    return "\n".join([head, title, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def _panels(results: list[dict[str, Any]]) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    panels: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        panels.setdefault(result["case"], []).append(result)
    return panels.items()


def _bars(rows: list[dict[str, Any]]) -> list[tuple[str, float, str]]:
    bars = [(rows[0]["subject"], rows[0]["value"], "own")]
    if "more" not in rows[0]["unit"] and "above" not in rows[0]["case"]:
        bars += [(row["against"], row["against_value"], "other") for row in rows if row["against_value"] is not None]
    return bars


def _panel(name: str, rows: list[dict[str, Any]], top: int) -> list[str]:
    unit = rows[0]["unit"]
    bars = _bars(rows)
    absolute = next((row["goal"] for row in rows if row["goal"] and "against" not in row["goal"]), None)
    goal = float(absolute.split()[1].replace(",", "")) if absolute else None
    most = max([value for _, value, _ in bars] + ([goal] if goal else []))
    room = WIDTH - NAME - VALUE
    note = "more is better" if unit == "/s" else "less is better"
    parts = [
        f'<text class="head" x="0" y="{top + 14}">{escape(name)}</text>',
        f'<text class="note" x="{WIDTH}" y="{top + 14}" text-anchor="end">{note}</text>',
    ]
    y = top + 24
    for label, value, kind in bars:
        width = max(1.0, room * max(value, 0) / most)
        parts += [
            f'<text x="{NAME - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>',
            f'<rect class="{kind}" x="{NAME}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2"/>',
            f'<text x="{NAME + width + 6:.1f}" y="{y + 12}">{escape(value_text(value, unit))}</text>',
        ]
        y += STEP
    if goal:
        x = NAME + room * goal / most
        parts.append(f'<line class="goal" x1="{x:.1f}" x2="{x:.1f}" y1="{top + 20}" y2="{y - 2}"/>')
    return parts
