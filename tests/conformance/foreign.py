"""How another program publishes to the channels of each broker, for the suite's foreign cases: scheme → function."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from trunkline.channel import Channel

PUBLISHERS: dict[str, Callable[[str, Channel, bytes, dict[str, str]], Awaitable[None]]] = {}
