"""Results of the suite of scaling as a picture: a panel for processes and one for lanes, a line for each broker.

Invariant: complete in itself, readable on light and dark pages; both scales are linear and begin at 0, so a line that
comes straight from there is a rate that grows with what was added; each line is named at its end. Read next: plot.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.plot import MARGIN, STYLE, WIDTH, masthead, picture, text

Result = dict[str, Any]
Points = list[tuple[int, float]]

PANELS = {
    "processes": "Processes of one service, a handler that only counts",
    "lanes": "Lanes in one process, a handler that waits 1 ms",
}
"""What is varied, and the title of its panel."""
PANEL = WIDTH // 2
LEFT, ROOM = 62, 234
"""Where the scale of a panel begins, and how long it is; in pixels."""
TOP, TALL = 108, 280
"""Where the scale of values ends, and how high it is."""
APART = 16
"""Least distance of two names."""
LIGHT = ("#1f6feb", "#bc4c00", "#1a7f37", "#8250df", "#cf222e", "#6e7781")
DARK = ("#58a6ff", "#f0883e", "#3fb950", "#bc8cff", "#ff7b72", "#9198a1")


def _colours(colours: tuple[str, ...]) -> str:
    return "\n".join(
        f".line{number} {{ stroke: {colour} }} .dot{number} {{ fill: {colour} }}"
        for number, colour in enumerate(colours)
    )


LINES = f"""{STYLE}
polyline {{ fill: none; stroke-width: 2 }} polyline.leader {{ stroke-width: 1 }}
.scale {{ stroke: #d1d9e0 }}
{_colours(LIGHT)}
@media (prefers-color-scheme: dark) {{ .scale {{ stroke: #3d444d }}
{_colours(DARK)}
}}
"""


def svg(results: list[Result]) -> str:
    """Return the picture."""
    title = "Trunkline with more processes, and with more lanes: messages a second"
    parts = list(masthead(title, results[0]["machine"]))
    for number, (varied, words) in enumerate(PANELS.items()):
        parts += _panel(number * PANEL, varied, words, _series(results, varied))
    return picture(title, TOP + TALL + 56, LINES, parts)


def _series(results: list[Result], varied: str) -> dict[str, Points]:
    """Return (how many, messages a second) of each broker."""
    series: dict[str, Points] = {}
    for result in results:
        number, _, what = result["subject"].partition(" ")
        if what == varied:
            broker = result["case"].rpartition(", ")[0]
            series.setdefault(broker, [(1, result["against_value"])]).append((int(number), result["value"]))
    return series


def _panel(offset: int, varied: str, title: str, series: dict[str, Points]) -> Iterator[str]:
    left, bottom = offset + LEFT, TOP + TALL
    numbers = [number for number, _ in next(iter(series.values()))]
    step, most = _scale(max(value for points in series.values() for _, value in points))

    def x(number: int) -> float:
        return left + ROOM * number / numbers[-1]

    def y(value: float) -> float:
        return bottom - TALL * value / most

    yield text("head", offset + MARGIN, TOP - 26, title)
    for tick in range(round(most / step) + 1):
        height = y(tick * step)
        yield f'<line class="scale" x1="{left}" x2="{left + ROOM}" y1="{height:.1f}" y2="{height:.1f}"/>'
        yield text("note", left - 8, round(height, 1) + 4, f"{tick * step:,.0f}", anchor="end")
    for number in numbers:
        yield text("note", round(x(number), 1), bottom + 18, f"{number}", anchor="middle")
    yield text("note", left + ROOM / 2, bottom + 36, varied, anchor="middle")
    names = _spread([y(points[-1][1]) for points in series.values()], bottom)
    for colour, ((broker, points), name) in enumerate(zip(series.items(), names, strict=True)):
        at = [f"{x(number):.1f},{y(value):.1f}" for number, value in points]
        yield f'<polyline class="line{colour}" points="{" ".join(at)}"/>'
        for dot in at:
            cx, _, cy = dot.partition(",")
            yield f'<circle class="dot{colour}" cx="{cx}" cy="{cy}" r="3"/>'
        yield f'<polyline class="leader line{colour}" points="{at[-1]} {left + ROOM + 14},{name:.1f}"/>'
        yield text(f"dot{colour}", left + ROOM + 18, round(name, 1) + 4, broker)


def _scale(most: float) -> tuple[float, float]:
    """Return a round step, and the end of a scale of 4 to 8 such steps that holds `most`."""
    power = 10 ** math.floor(math.log10(most))
    step = next(power * factor for factor in (0.2, 0.5, 1, 2) if most <= 8 * power * factor)
    return step, step * math.ceil(most / step)


def _spread(heights: list[float], bottom: float) -> list[float]:
    """Return where names stand: beside the ends of their lines, as far as they do not touch one another."""
    placed = dict.fromkeys(range(len(heights)), 0.0)
    below = bottom + APART
    for number in sorted(placed, key=lambda number: -heights[number]):
        below = placed[number] = min(heights[number], below - APART)
    return list(placed.values())
