"""Whether a client still knows a broker: one that knows none does not reach the cluster again.

A node that is being stopped or started may answer that the cluster has no brokers. librdkafka then forgets those it
knows, and where the connection ended in the same moment it does not go back to `bootstrap.servers`: it asks nobody, and
says nothing, until its process ends (librdkafka #5301; seen with 2.16.0, whatever `metadata.recovery.*` is set to).
Such a client is made anew. Never does: I/O. Read next: reader.py, publisher.py.
"""

from __future__ import annotations

import msgspec

STATISTICS_S = 2.0
"""How often a client says which brokers it knows."""
TIMES = 2
"""So often in a row it has to know none: while it goes back to `bootstrap.servers`, it knows none for a moment."""
_REAL = {"configured", "learned"}
"""Where a broker is known from; others are the client's own, such as the one that stands for the coordinator."""


class _Broker(msgspec.Struct):
    source: str


class _Statistics(msgspec.Struct):
    brokers: dict[str, _Broker]


class Stranded:
    """What one client has said of the brokers it knows.

    >>> client = Stranded()
    >>> for _ in range(TIMES):
    ...     client.note('{"brokers": {"GroupCoordinator": {"source": "logical"}}}')
    >>> bool(client)
    True
    """

    def __init__(self) -> None:
        self._times = 0

    def __bool__(self) -> bool:
        """Return whether the client has to be made anew."""
        return self._times >= TIMES

    def note(self, statistics: str) -> None:
        """Note what the client says of itself.

        Source: librdkafka, STATISTICS.md.
        """
        brokers = msgspec.json.decode(statistics, type=_Statistics).brokers
        self._times = 0 if any(broker.source in _REAL for broker in brokers.values()) else self._times + 1
