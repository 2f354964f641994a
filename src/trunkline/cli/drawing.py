"""A topology as SVG: who publishes on the left, channels in the middle, who handles on the right.

Invariant: the same topology gives the same bytes; no edge label covers another, because every message has a
line of its own at its service. Read next: ../topology.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

import msgspec

from trunkline.topology import EVERY, ChannelNode, Link, Topology

LINE = 22
"""Height of one message, in pixels."""
GAP = 18
CHAR = 7.3
"""Width of one character of the 12 px monospace font."""
BEND = 110
"""Width of the strip in which lines change their height."""
TOP = 76
MARGIN = 24
OUTSIDE = "(outside)"
"""Stands for whoever publishes what no handler here does."""
_COLOURS = {"queue": "#fde8c8", "topic": "#dcedc8", "stream": "#d3e5f7"}
_BORDERS = {"queue": "#b7791f", "topic": "#558b2f", "stream": "#2b6cb0"}

_STYLE = (
    "text{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#1a202c}"
    ".head{font-weight:bold}.soft{fill:#4a5568;font-size:11px}.title{font-size:15px;font-weight:bold}"
    ".service{fill:#edf2f7;stroke:#4a5568}.edge{fill:none;stroke:#718096;stroke-width:1.3}"
)

_TIP = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"'
    ' orient="auto"><path d="M0 0 8 4 0 8z" fill="#718096"/></marker></defs>'
)


class _Box(msgspec.Struct):
    """A service or channel: `links` are its lines from top to bottom."""

    name: str
    links: list[Link]
    minimum: int = 1
    y: float = 0.0

    @property
    def height(self) -> float:
        return max(len(self.links), self.minimum) * LINE + 10

    @property
    def middle(self) -> float:
        return self.y + self.height / 2

    def port(self, link: Link) -> float:
        """Return the height at which the line of `link` ends."""
        spare = (self.height - len(self.links) * LINE) / 2
        return self.y + spare + (self.links.index(link) + 0.5) * LINE


def to_svg(topology: Topology) -> str:
    """Return the drawing, complete in itself: no scripts, fonts or links."""
    handles = _unique(topology.handles)
    outside = [
        Link(OUTSIDE, link.channel, link.message, "")
        for link in handles
        if link.message != EVERY and not topology.ends(link.channel, link.message)[0]
    ]
    publishes = _unique([*topology.publishes, *outside])
    left = _boxes(publishes, lambda link: link.service)
    right = _boxes(handles, lambda link: link.service)
    middle = [_Box(channel.name, [], minimum=2) for channel in topology.channels]
    ins, outs = _channel_ports(middle, publishes), _channel_ports(middle, handles)
    for box, taken, given in zip(middle, ins, outs, strict=True):
        box.minimum = max(2, len(taken.links), len(given.links))
    _arrange(left, middle, right, ins, outs)
    return _Sheet(topology, (left, middle, right), ins, outs).draw()


def _unique(links: Sequence[Link]) -> list[Link]:
    """Return one Link per service, channel and message, without the handler."""
    return list(dict.fromkeys(Link(link.service, link.channel, link.message, "") for link in links))


def _boxes(links: Sequence[Link], name_of: Callable[[Link], str]) -> list[_Box]:
    found: dict[str, _Box] = {}
    for link in links:
        found.setdefault(name_of(link), _Box(name_of(link), [])).links.append(link)
    return list(found.values())


def _channel_ports(channels: Sequence[_Box], links: Sequence[Link]) -> list[_Box]:
    """Return one side of each channel: where its lines end."""
    return [_Box(box.name, [link for link in links if link.channel == box.name]) for box in channels]


def _arrange(left: list[_Box], middle: list[_Box], right: list[_Box], ins: list[_Box], outs: list[_Box]) -> None:
    """Order boxes and lines so that few lines cross: each goes to the mean height of what it is joined to."""
    sides = {box.name: (box, taken, given) for box, taken, given in zip(middle, ins, outs, strict=True)}

    def place_channels() -> None:
        _stack(middle)
        for box, taken, given in sides.values():
            for side in (taken, given):
                side.y, side.minimum = box.y, box.minimum

    for column in (left, middle, right):
        _stack(column)
    place_channels()
    for _ in range(8):
        for column in (left, right):
            column.sort(key=lambda box: _mean([sides[link.channel][0].middle for link in box.links], box.middle))
            _stack(column)
        senders = {box.name: box for box in left}
        takers = {box.name: box for box in right}
        middle.sort(
            key=lambda box: _mean(
                [senders[link.service].middle for link in sides[box.name][1].links]
                + [takers[link.service].middle for link in sides[box.name][2].links],
                box.middle,
            )
        )
        place_channels()
        for box in (*left, *right):
            box.links.sort(key=lambda link: (sides[link.channel][0].y, link.message))
        for _, taken, given in sides.values():
            taken.links.sort(key=lambda link: senders[link.service].port(link))
            given.links.sort(key=lambda link: takers[link.service].port(link))
    ins[:] = [sides[box.name][1] for box in middle]
    outs[:] = [sides[box.name][2] for box in middle]
    _centre((left, middle, right))
    for box, taken, given in sides.values():
        taken.y = given.y = box.y


def _stack(column: Sequence[_Box]) -> None:
    y = float(TOP)
    for box in column:
        box.y = y
        y += box.height + GAP


def _centre(columns: Sequence[Sequence[_Box]]) -> None:
    """Let shorter columns stand in the middle of the longest."""
    heights = [sum(box.height + GAP for box in column) for column in columns]
    for column, height in zip(columns, heights, strict=True):
        for box in column:
            box.y += (max(heights) - height) / 2


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


class _Sheet:
    """The places of everything, and the drawing of it."""

    def __init__(
        self, topology: Topology, columns: tuple[list[_Box], list[_Box], list[_Box]], ins: list[_Box], outs: list[_Box]
    ) -> None:
        self._topology = topology
        self._left, self._middle, self._right = columns
        self._ins, self._outs = ins, outs
        self._channels = {channel.name: channel for channel in topology.channels}
        service_width = _width([box.name for box in (*self._left, *self._right)])
        channel_width = _width([name for box in self._middle for name in (box.name, self._kind(box))])
        labels = [_width([link.message for box in side for link in box.links]) for side in (self._left, self._right)]
        self._x_left = (MARGIN, MARGIN + service_width)
        self._x_in = self._x_left[1] + labels[0]
        self._x_middle = (self._x_in + BEND, self._x_in + BEND + channel_width)
        self._x_out = self._x_middle[1] + BEND
        self._x_right = (self._x_out + labels[1], self._x_out + labels[1] + service_width)
        boxes = (*self._left, *self._middle, *self._right)
        self._height = max((box.y + box.height for box in boxes), default=TOP) + MARGIN

    def _kind(self, box: _Box) -> str:
        channel: ChannelNode = self._channels[box.name]
        parts = [channel.kind]
        if channel.partitions:
            parts.append(f"{channel.partitions} partitions")
        if channel.key:
            parts.append(f"key {channel.key}")
        return ", ".join(parts)

    def draw(self) -> str:
        """Return the SVG."""
        width = self._x_right[1] + MARGIN
        system = escape(self._topology.system)
        parts = [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {self._height:.0f}"'
                f' width="{width:.0f}" height="{self._height:.0f}" role="img" aria-label="Topology of {system}">'
            ),
            f"<style>{_STYLE}</style>",
            _TIP,
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            f'<text class="title" x="{MARGIN}" y="30">{system}</text>',
        ]
        for x, title in (
            (self._x_left[0], "publishes"), (self._x_middle[0], "channel"), (self._x_right[0], "handles")
        ):  # fmt: skip
            parts.append(f'<text class="soft" x="{x:.0f}" y="{TOP - 14}">{title}</text>')
        parts += self._edges()
        for boxes, (x, end) in ((self._left, self._x_left), (self._right, self._x_right)):
            parts += [_box(x, end, box, [box.name], _look(box)) for box in boxes]
        for box in self._middle:
            kind = self._channels[box.name].kind
            look = f'fill="{_COLOURS[kind]}" stroke="{_BORDERS[kind]}"'
            parts.append(_box(*self._x_middle, box, [box.name, self._kind(box)], look))
        return "\n".join((*parts, "</svg>\n"))

    def _edges(self) -> list[str]:
        parts = []
        senders = {box.name: box for box in self._left}
        takers = {box.name: box for box in self._right}
        for channel in self._ins:
            for link in channel.links:
                y, to = senders[link.service].port(link), channel.port(link)
                parts.append(_edge(self._x_left[1], self._x_in, self._x_middle[0], y, to))
                parts.append(_label(self._x_left[1] + 8, y, link.message))
        for channel in self._outs:
            for link in channel.links:
                y, to = channel.port(link), takers[link.service].port(link)
                parts.append(_edge(self._x_middle[1], self._x_middle[1], self._x_out, y, to, self._x_right[0]))
                parts.append(_label(self._x_out + 4, to, link.message))
        return parts


def _width(names: Sequence[str]) -> float:
    return max((len(name) for name in names), default=0) * CHAR + 24


def _edge(start: float, bend: float, bent: float, y: float, to: float, end: float | None = None) -> str:
    middle = (bend + bent) / 2
    last = "" if end is None else f"H{end - 1:.1f}"
    tip = bent - 1 if end is None else bent
    return (
        f'<path class="edge" marker-end="url(#tip)" d="M{start:.1f} {y:.1f}H{bend:.1f}'
        f'C{middle:.1f} {y:.1f} {middle:.1f} {to:.1f} {tip:.1f} {to:.1f}{last}"/>'
    )


def _look(box: _Box) -> str:
    return 'class="service" stroke-dasharray="4 3"' if box.name == OUTSIDE else 'class="service"'


def _label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y - 4:.1f}">{escape(text)}</text>'


def _box(x: float, end: float, box: _Box, lines: Sequence[str], look: str) -> str:
    centre = (x + end) / 2
    parts = [
        f'<rect x="{x:.1f}" y="{box.y:.1f}" width="{end - x:.1f}" height="{box.height:.1f}" rx="6" {look}/>',
    ]
    first = box.middle + 4 - 8 * (len(lines) - 1)
    for number, line in enumerate(lines):
        kind = "soft" if number else "head"
        y = first + 16 * number
        parts.append(f'<text class="{kind}" x="{centre:.1f}" y="{y:.1f}" text-anchor="middle">{escape(line)}</text>')
    return "".join(parts)
