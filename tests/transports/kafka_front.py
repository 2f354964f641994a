"""Stands before a Kafka of one node and can answer as one that is being stopped: "there are no brokers".

Invariant: clients know no other address than this one's; without `empties` nothing else is changed.
Source: Kafka protocol: Metadata (3) from version 9, FindCoordinator (10).
"""

import asyncio
import contextlib
import struct

HOST = b"127.0.0.1"
METADATA, FIND_COORDINATOR = 3, 10


class Front:
    """Stands before the node at `port`.

    Attributes:
        empties: every answer to a Metadata request names no broker, and ends all connections.
        answered: how many such answers there were.
        port: where it listens, from `start` on.
    """

    def __init__(self, port):
        self.empties = False
        self.answered = 0
        self.port = 0
        self._node_port = port
        self._writers = set()

    async def __aenter__(self):
        await self.start()
        return self

    async def __aexit__(self, *_exception):
        await self.stop()

    async def start(self):
        """Listen, after a stop where it did before."""
        self._server = await asyncio.start_server(self._accept, HOST.decode(), self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self):
        """End every connection and take no new ones."""
        self._server.close()
        self.hang_up()
        await self._server.wait_closed()

    def hang_up(self):
        """End every connection."""
        for writer in list(self._writers):
            writer.close()

    async def _accept(self, client_reader, client):
        node_reader, node = await asyncio.open_connection(HOST.decode(), self._node_port)
        asked = {}
        both = {client, node}
        self._writers |= both
        await asyncio.gather(
            self._carry(client_reader, node, both, lambda frame: self._request(frame, asked)),
            self._carry(node_reader, client, both, lambda frame: self._response(frame, asked)),
        )
        self._writers -= both

    async def _carry(self, reader, writer, both, change):
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                (size,) = struct.unpack(">i", await reader.readexactly(4))
                frame = change(await reader.readexactly(size))
                writer.write(struct.pack(">i", len(frame)) + frame)
                await writer.drain()
        for one in both:
            one.close()

    def _request(self, frame, asked):
        api, _version, number = struct.unpack_from(">hhi", frame)
        asked[number] = api
        return frame

    def _response(self, frame, asked):
        api = asked.pop(*struct.unpack_from(">i", frame))
        if api in (METADATA, FIND_COORDINATOR):
            frame = frame.replace(HOST + struct.pack(">i", self._node_port), HOST + struct.pack(">i", self.port))
        if api == METADATA and self.empties:
            self.answered += 1
            asyncio.get_running_loop().call_soon(self.hang_up)  # after this answer was written
            return _without_brokers(frame)
        return frame


def _without_brokers(frame):
    """Take the only broker out: a compact array of number, host, port, rack (none) and tags (none)."""
    start = frame.index(bytes([len(HOST) + 1]) + HOST) - 5
    assert frame[start] == 2, "one broker"
    return frame[:start] + b"\x01" + frame[start + 1 + 4 + 1 + len(HOST) + 4 + 1 + 1 :]
