"""Results as a picture: one panel per case with a goal, a bar for Trunkline and one for each it is compared with.

Invariant: complete in itself, readable on light and dark pages; each panel says whether more is better, each bar with a
goal where that is and whether it was missed. Figures have a column of their own, so nothing runs through them.
Read next: curves.py, report.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from benchmarks.report import value_text

Result = dict[str, Any]

WIDTH, MARGIN = 890, 16
BARS, ROOM = 226, 300
"""Where bars begin, and the length of the longest; in pixels."""
FIGURES, GOALS = 638, 654
"""Where figures end and goals begin."""
TOP, HEAD, STEP, BAR = 92, 28, 17, 12
"""Heights: of the heading, of a panel's title with the gap above it, of a row, of a bar."""
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f } .title { font-size: 16px; font-weight: 600 }
.head { font-size: 13px; font-weight: 600 } .note { fill: #59636e }
.own { fill: #1f6feb } .missed { fill: #cf222e } .other { fill: #b6bec9 }
.goal { stroke: #24292f; stroke-width: 2; stroke-dasharray: 3 2 } text.missed { font-weight: 600 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .note { fill: #9198a1 } .other { fill: #57606a } .missed { fill: #f85149 }
  .goal { stroke: #e6edf3 }
}
"""


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        kind: `own`, `missed` or `other`; how it looks.
        goal: where its goal is, on the scale of the values. verdict: the goal in words.
    """

    label: str
    value: float
    kind: str
    goal: float | None = None
    verdict: str = ""


def svg(results: list[Result]) -> str:
    """Return the picture."""
    parts = list(_heading(results[0]["machine"]))
    top = TOP
    for title, unit, bars in _panels(results):
        parts += _panel(title, unit, bars, top)
        top += HEAD + STEP * len(bars)
    return picture("Trunkline beside hand-written loops and peers", top + MARGIN, STYLE, parts)


def picture(title: str, height: int, style: str, parts: Iterable[str]) -> str:
    """Return a whole picture of `parts`, WIDTH wide."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' role="img">'
    )
    return "\n".join([head, f"<title>{title}</title>", f"<style>{style}</style>", *parts, "</svg>", ""])


def masthead(title: str, machine: dict[str, str]) -> Iterator[str]:
    """Yield the title, and where and when it was measured."""
    disk = machine["disk"].partition(",")[0]
    where = (
        f"Measured {machine['measured']} on {machine['processor']}, {machine['memory']}, {machine['system']}, {disk}"
    )
    yield text("title", MARGIN, 30, title)
    yield text("note", MARGIN, 50, where)


def _heading(machine: dict[str, str]) -> Iterator[str]:
    yield from masthead("Trunkline beside hand-written loops and peers: the cases with a goal", machine)
    x = MARGIN
    for kind, words in (("own", "Trunkline"), ("missed", "Trunkline, goal missed"), ("other", "compared with")):
        yield f'<rect class="{kind}" x="{x}" y="64" width="20" height="{BAR}" rx="2"/>'
        yield text("", x + 26, 74, words)
        x += 46 + 7 * len(words)
    yield f'<line class="goal" x1="{x + 8}" x2="{x + 8}" y1="62" y2="78"/>'
    yield text("", x + 18, 74, "goal; if it is a ratio, to the best of those compared with")


def _panels(results: list[Result]) -> Iterator[tuple[str, str, list[Bar]]]:
    """Yield (title, unit, bars); cases that differ in Trunkline's part alone share a panel."""
    cases = [(name, list(rows)) for name, rows in groupby(results, key=lambda result: result["case"])]
    with_goal = [(name, rows) for name, rows in cases if any(row["goal"] for row in rows)]
    for (*_, unit), group in groupby(with_goal, key=_shared):
        panel = list(group)
        title = panel[0][0] if len(panel) == 1 else panel[0][0].rpartition(", ")[0]
        own = [_own(rows) for _, rows in panel]
        yield title, unit, [*own, *_others(panel[0][1])]


def _shared(case: tuple[str, list[Result]]) -> tuple[Any, ...]:
    name, rows = case
    others = tuple((row["against"], row["against_value"]) for row in rows)
    return name.rpartition(", ")[0], others, rows[0]["goal"], rows[0]["unit"]


def _others(rows: list[Result]) -> list[Bar]:
    if "more" in rows[0]["unit"]:
        return []  # a difference: the other is in it already
    return [Bar(row["against"], row["against_value"], "other") for row in rows if row["against_value"] is not None]


def _own(rows: list[Result]) -> Bar:
    wanted = [row for row in rows if row["goal"]]
    places = [place for row in wanted if (place := _place(row)) is not None]
    lower = wanted[0]["goal"].startswith("≤")
    missed = any(row["met"] is False for row in wanted)
    verdict = f"goal {wanted[0]['goal'].replace('× against', '× the other')}{': missed' if missed else ''}"
    place = (min if lower else max)(places)
    return Bar(rows[0]["subject"], rows[0]["value"], "missed" if missed else "own", place, verdict)


def _place(row: Result) -> float | None:
    """Return where a goal is on the scale of the values; None if it is a ratio to what did not run."""
    _, number, *unit = row["goal"].split()
    goal = float(number.replace(",", ""))
    if "against" not in unit:
        return goal
    return None if row["against_value"] is None else goal * row["against_value"]


def _panel(title: str, unit: str, bars: list[Bar], top: int) -> Iterator[str]:
    most = max(max(bar.value, bar.goal or 0.0) for bar in bars)
    note = "more is better" if unit == "/s" else "less is better"
    yield text("head", MARGIN, top + 18, title)
    yield text("note", WIDTH - MARGIN, top + 18, note, anchor="end")
    for number, bar in enumerate(bars):
        y = top + HEAD - 4 + number * STEP
        width = max(1.0, ROOM * max(bar.value, 0.0) / most)
        yield text("", BARS - 8, y + 10, bar.label, anchor="end")
        yield f'<rect class="{bar.kind}" x="{BARS}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2"/>'
        yield text("", FIGURES, y + 10, value_text(bar.value, unit), anchor="end")
        if bar.goal is not None:
            x = BARS + ROOM * bar.goal / most
            yield f'<line class="goal" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 2}" y2="{y + BAR + 2}"/>'
            yield text("missed" if bar.kind == "missed" else "note", GOALS, y + 10, bar.verdict)


def text(kind: str, x: float, y: float, words: str, *, anchor: str = "start") -> str:
    """Return a line of text; `kind` is how it looks."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'
