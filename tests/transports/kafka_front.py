"""Stands before a Kafka of one node and can answer as one that is being stopped: "there are no brokers".

Invariant: clients know no other address than this one's; without `empties` nothing else is changed.
Source: Kafka protocol: Metadata (3) from version 9, FindCoordinator (10).
"""

import asyncio
import contextlib
import struct

from trunkline.testing.proxy import Connection, Proxy

HOST = b"127.0.0.1"
METADATA, FIND_COORDINATOR = 3, 10


class FrontConnection(Connection):
    """Carries whole frames, for it changes some of them."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._asked = {}

    async def pump(self, source, target):
        change = self._response if target is self.to_client else self._request
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (size,) = struct.unpack(">i", await source.readexactly(4))
                frame = change(await source.readexactly(size))
                target.write(struct.pack(">i", len(frame)) + frame)
                await target.drain()

    def _request(self, frame):
        api, _version, number = struct.unpack_from(">hhi", frame)
        self._asked[number] = api
        return frame

    def _response(self, frame):
        front = self.proxy
        api = self._asked.pop(*struct.unpack_from(">i", frame))
        if api in (METADATA, FIND_COORDINATOR):
            frame = frame.replace(HOST + struct.pack(">i", front.node_port), HOST + struct.pack(">i", front.port))
        if api == METADATA and front.empties:
            front.answered += 1
            asyncio.get_running_loop().call_soon(front.reset)  # after this answer was written
            return _without_brokers(frame)
        return frame


class Front(Proxy):
    """Stands before the node at `port`.

    Attributes:
        empties: every answer to a Metadata request names no broker, and ends all connections.
        answered: how many such answers there were.
    """

    connection = FrontConnection

    def __init__(self, port):
        super().__init__(HOST.decode(), port)
        self.node_port = port
        self.empties = False
        self.answered = 0


def _without_brokers(frame):
    """Take the only broker out: a compact array of number, host, port, rack (none) and tags (none)."""
    start = frame.index(bytes([len(HOST) + 1]) + HOST) - 5
    assert frame[start] == 2, "one broker"
    return frame[:start] + b"\x01" + frame[start + 1 + 4 + 1 + len(HOST) + 4 + 1 + 1 :]
