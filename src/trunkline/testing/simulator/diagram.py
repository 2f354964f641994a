"""A story as a sequence diagram: SVG for a browser, Mermaid text for Markdown.

Invariant: the same story gives the same bytes; time goes down, one row for each line of the story, and no text covers
another. Read next: story.py.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from xml.sax.saxutils import escape

from trunkline.testing.simulator.story import Line, Story

COLUMN = 230
"""Distance of two lifelines, in pixels."""
GUTTER = 90
"""Width of the column with the times."""
TOP = 104
TEXT = 15
"""Height of one line of text."""
CHAR = 6.7
"""Width of one character of the 11 px monospace font."""
PAD = 7
GAP = 14

_STYLE = (
    "text{font:11px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#1a202c}"
    ".title{font-size:15px;font-weight:bold}.head{font-weight:bold;font-size:12px}.soft{fill:#718096}"
    ".life{stroke:#cbd5e0;stroke-width:1.2}.place{fill:#edf2f7;stroke:#4a5568}"
    ".arrow{stroke:#2b6cb0;stroke-width:1.5;fill:none}.dashed{stroke-dasharray:4 3}"
    ".note{fill:#f7fafc;stroke:#a0aec0}.fault{fill:#fed7d7;stroke:#c53030}.broken{fill:#c53030;stroke:#742a2a}"
    ".broken+text,.broken+text tspan{fill:#ffffff;font-weight:bold}"
)
_TIP = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"'
    ' orient="auto"><path d="M0 0 8 4 0 8z" fill="#2b6cb0"/></marker></defs>'
)


def places(story: Story) -> list[str]:
    """Return the lifelines from left to right: who uses the system, its services, the broker, what is outside."""
    found = dict.fromkeys(
        place for line in story.lines if line.text != "start" for place in (line.who, line.to) if place not in _NOWHERE
    )
    outside = [line.to for line in story.lines if line.to not in {line.who, "broker"} and line.who != "broker"]
    ends = ["broker", *dict.fromkeys(outside)]
    inner = [place for place in found if place not in {"client", *ends}]
    return [*(["client"] if "client" in found else []), *inner, *(place for place in ends if place in found)]


_NOWHERE = frozenset({"world", "in the end"})
"""Not lifelines: what concerns the whole run."""


def to_svg(story: Story) -> str:
    """Return the drawing, complete in itself: no scripts, fonts or links."""
    names = places(story)
    sheet = _Sheet({name: GUTTER + COLUMN * (number + 0.5) for number, name in enumerate(names)})
    for line in story.lines:
        if line.text not in {"start", "starts"}:
            sheet.add(line)
    return sheet.draw(story)


class _Sheet:
    """Rows from top to bottom.

    Args:
        x: of each lifeline.
    """

    def __init__(self, x: dict[str, float]) -> None:
        self._x = x
        self._width = GUTTER + COLUMN * max(len(x), 2) + GAP
        self._y = float(TOP)
        self._parts: list[str] = []

    def add(self, line: Line) -> None:
        """Draw one line of the story below those before."""
        if line.who == line.to or line.to not in self._x or line.who not in self._x:
            height, parts = self._note(line)
        else:
            height, parts = self._arrow(line)
        time = f'<text class="soft" x="{GUTTER - 12}" y="{self._y + TEXT:.0f}" text-anchor="end">{line.at:.3f} s</text>'
        self._parts += [time, *parts]
        self._y += height + GAP

    def _note(self, line: Line) -> tuple[float, list[str]]:
        whole = line.who not in self._x
        width = self._width - GUTTER - GAP if whole else COLUMN - GAP
        centre = GUTTER + width / 2 if whole else self._x[line.who]
        rows = _wrapped(line.label, width - 2 * PAD)
        height = len(rows) * TEXT + 2 * PAD
        box = (
            f'<rect class="{line.mark or "note"}" x="{centre - width / 2:.0f}" y="{self._y:.0f}" width="{width:.0f}"'
            f' height="{height}" rx="4"/>'
        )
        return height, [box, _text(rows, centre, self._y + PAD)]

    def _arrow(self, line: Line) -> tuple[float, list[str]]:
        start, end = self._x[line.who], self._x[line.to]
        rows = _wrapped(line.label, abs(end - start) - 2 * PAD)
        y = self._y + len(rows) * TEXT + PAD
        tip = end - 2 if end > start else end + 2
        kind = "arrow dashed" if line.dashed else "arrow"
        if line.lost:
            tip = (start + end) / 2
            lost = (
                f'<text class="head" x="{tip:.0f}" y="{y + 4:.0f}" text-anchor="middle" style="fill:#c53030">✕</text>'
            )
        else:
            lost = ""
        marker = "" if line.lost else ' marker-end="url(#tip)"'
        path = f'<path class="{kind}"{marker} d="M{start:.0f} {y:.0f}H{tip:.0f}"/>'
        return len(rows) * TEXT + 2 * PAD, [_text(rows, (start + end) / 2, self._y, halo=True), path, lost]

    def draw(self, story: Story) -> str:
        """Return the SVG."""
        height = self._y + GAP
        title = escape(f"broken: {story.violation.promise}")
        label = escape(f"broken: {story.violation.promise}", {'"': "&quot;"})
        head = [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self._width:.0f} {height:.0f}"'
                f' width="{self._width:.0f}" height="{height:.0f}" role="img" aria-label="{label}">'
            ),
            f"<style>{_STYLE}</style>",
            _TIP,
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            f'<text class="title" x="{GAP}" y="26">{title}</text>',
            f'<text class="soft" x="{GAP}" y="46">on {escape(story.broker)}; {escape(story.faults)}</text>',
        ]
        for name, x in self._x.items():
            width = COLUMN - 3 * GAP
            head.append(f'<path class="life" d="M{x:.0f} {TOP - 20}V{self._y:.0f}"/>')
            head.append(
                f'<rect class="place" x="{x - width / 2:.0f}" y="{TOP - 46}" width="{width}" height="28" rx="6"/>'
            )
            head.append(f'<text class="head" x="{x:.0f}" y="{TOP - 28}" text-anchor="middle">{escape(name)}</text>')
        return "\n".join((*head, *(part for part in self._parts if part), "</svg>\n"))


def _wrapped(text: str, width: float) -> list[str]:
    return textwrap.wrap(text, max(8, int(width / CHAR))) or [""]


def _text(rows: Sequence[str], x: float, y: float, *, halo: bool = False) -> str:
    style = ' style="paint-order:stroke;stroke:#ffffff;stroke-width:4px"' if halo else ""
    lines = "".join(
        f'<tspan x="{x:.0f}" y="{y + TEXT * (number + 1) - 4:.0f}">{escape(row)}</tspan>'
        for number, row in enumerate(rows)
    )
    return f'<text text-anchor="middle"{style}>{lines}</text>'


def to_mermaid(story: Story) -> str:
    """Return the text of a Mermaid sequence diagram."""
    names = places(story)
    ids = {name: f"p{number}" for number, name in enumerate(names)}
    over = f"{ids[names[0]]},{ids[names[-1]]}" if len(names) > 1 else "".join(ids.values())
    lines = ["sequenceDiagram", *(f"    participant {ids[name]} as {_safe(name)}" for name in names)]
    for line in story.lines:
        if line.text in {"start", "starts"}:
            continue
        text = _safe(f"{line.at:.3f} s {'⚡ ' if line.mark == 'fault' else ''}{line.label}")
        if line.who not in ids:
            lines.append(f"    Note over {over}: {text}")
        elif line.to == line.who or line.to not in ids:
            lines.append(f"    Note over {ids[line.who]}: {text}")
        else:
            arrow = "-x" if line.lost else "-->>" if line.dashed else "->>"
            lines.append(f"    {ids[line.who]}{arrow}{ids[line.to]}: {text}")
    return "\n".join((*lines, ""))


def _safe(text: str) -> str:
    """Return text without what Mermaid takes for its own: `#`, `;`, `<`, `>` and line ends."""
    made = {"#": "#35;", ";": "#59;", "<": "#lt;", ">": "#gt;", "\n": " "}
    return "".join(made.get(character, character) for character in text)
