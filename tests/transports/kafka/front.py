"""Stands before a Kafka of one node and can answer in its place: "no brokers", "I have that already", "not the leader".

Invariant: clients know no other address than this one's; without `empties`, `repeated`, `unready`, `uncommitted` or
`moving` no more is changed.
Source: Kafka protocol: Produce (0) from version 9, Metadata (3) from version 9, OffsetCommit (8), FindCoordinator (10).
"""

import asyncio
import contextlib
import struct

from trunkline.testing.proxy import Connection, Proxy

HOST = b"127.0.0.1"
PRODUCE, METADATA, OFFSET_COMMIT, FIND_COORDINATOR = 0, 3, 8, 10
NOT_LEADER, REBALANCE_IN_PROGRESS, DUPLICATE_SEQUENCE_NUMBER = 6, 27, 46


class FrontConnection(Connection):
    """Carries whole frames, for it changes some of them."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._asked = {}
        self._held = self._refused = None

    async def pump(self, source, target):
        change = self._response if target is self.to_client else self._request
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (size,) = struct.unpack(">i", await source.readexactly(4))
                for frame in change(await source.readexactly(size)):
                    target.write(struct.pack(">i", len(frame)) + frame)
                await target.drain()

    def _request(self, frame):
        front = self.proxy
        api, _version, number = struct.unpack_from(">hhi", frame)
        self._asked[number] = api
        if front.silent or (front.uncommitted and api == OFFSET_COMMIT):
            front.silent = True
            return []
        if api == OFFSET_COMMIT and front.moving is not None and front.moving in frame:
            self._refused, front.moving = front.moving, None
            return [_of_nothing(frame, self._refused)]
        if api == PRODUCE and front.unready is not None and front.unready in frame:
            if self._held is None:
                self._held = number
                front.holds = True
                return []
            front.unready = None
        return [frame]

    def _response(self, frame):
        (number,) = struct.unpack_from(">i", frame)
        api = self._asked.pop(number)
        if api == PRODUCE and self._held is not None:
            refused, self._held = _not_leader(frame, self._held), None
            return [refused, frame]
        return [self._changed(api, frame)]

    def _changed(self, api, frame):
        front = self.proxy
        if api in (METADATA, FIND_COORDINATOR):
            frame = frame.replace(HOST + struct.pack(">i", front.node_port), HOST + struct.pack(">i", front.port))
        if api == PRODUCE and front.repeated is not None:
            return _repeated(frame, front.repeated)
        if api == OFFSET_COMMIT and self._refused is not None:
            topic, self._refused = self._refused, None
            return _moving(frame, topic)
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
        repeated: what is written to this topic is answered for as if it had been written before.
        unready: the first request to write to this topic is refused, once the second one has been answered.
        holds: whether the first one is there.
        moving: the next request to commit an offset of this topic is answered as by a group that rebalances.
        uncommitted: from the first request to commit offsets on, nothing is passed to the node: silent.
    """

    connection = FrontConnection

    def __init__(self, port):
        super().__init__(HOST.decode(), port)
        self.node_port = port
        self.empties = False
        self.answered = 0
        self.repeated = self.unready = self.moving = None
        self.holds = self.uncommitted = self.silent = False


def _without_brokers(frame):
    """Take the only broker out: a compact array of number, host, port, rack (none) and tags (none)."""
    start = frame.index(bytes([len(HOST) + 1]) + HOST) - 5
    assert frame[start] == 2, "one broker"
    return frame[:start] + b"\x01" + frame[start + 1 + 4 + 1 + len(HOST) + 4 + 1 + 1 :]


def _repeated(frame, topic):
    return _with_error(frame, frame.index(topic) + len(topic), DUPLICATE_SEQUENCE_NUMBER)


def _of_nothing(frame, topic):
    """Make of a request to commit an offset one for the first: after the name an array of number and offset."""
    start = frame.index(topic) + len(topic)
    return frame[: start + 5] + bytes(8) + frame[start + 13 :]


def _moving(frame, topic):
    """Change the error of the only partition: after the name a compact array of number and error."""
    start = frame.index(topic) + len(topic)
    assert frame[start] == 2, "one partition"
    return frame[: start + 5] + struct.pack(">h", REBALANCE_IN_PROGRESS) + frame[start + 7 :]


def _not_leader(frame, number):
    """Make of an answer to a Produce request that of another one, which was refused."""
    # After number and tags an array of one topic: its name with the length before it.
    return _with_error(struct.pack(">i", number) + frame[4:], 7 + frame[6] - 1, NOT_LEADER)


def _with_error(frame, start, error):
    """Change the error of the only partition: after the name a compact array of number, error and offset."""
    assert frame[start] == 2, "one partition"
    return frame[: start + 5] + struct.pack(">hq", error, -1) + frame[start + 15 :]
