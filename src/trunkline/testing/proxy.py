"""A TCP proxy that spoils connections on purpose: latency, slices, cuts, resets, silence.

Invariant: without a toxic it changes no byte; it listens on the loopback only. For brokers that are reached at one
address: one that tells its clients another address (Kafka's `advertised.listeners`) is reached past the proxy, unless
it is told to advertise the proxy's. Read next: conformance/failure.py.
Source: the toxics of Toxiproxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Self

import msgspec

from trunkline.clock import Clock, Draws, system_clock

CHUNK_BYTES = 65536


class Toxics(msgspec.Struct):
    """What is done to what passes; change it at any time.

    Attributes:
        latency_s: each piece waits so long, and up to `jitter_s` more.
        slice_bytes: pieces are no longer than this; 0 leaves them.
        bytes_per_s: no more than this passes in one direction of a connection; 0 sets no limit.
        cut_after: a connection is reset when so many bytes have passed in either direction, drawn anew for each
            connection between these two; None lets it live.
        swallow: nothing passes, and nobody is told: a half-open connection.
        mute: what the broker says does not pass, and nobody is told; what is said to it does.
        down: new connections are refused.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    slice_bytes: int = 0
    bytes_per_s: int = 0
    cut_after: tuple[int, int] | None = None
    swallow: bool = False
    mute: bool = False
    down: bool = False


class Proxy:
    """Stands before `host:port`.

    Attributes:
        connection: class of what carries one connection; a subclass of `Connection` may change what passes.
        toxics: for all connections.
        port: where it listens, from `start` on.
        connections: how many there were.
        cuts: how many of them it reset.
        passed: bytes that went through.

    >>> Proxy("127.0.0.1", 5672).toxics.latency_s
    0.0
    """

    connection: type[Connection]

    def __init__(self, host: str, port: int, *, seed: int = 7, clock: Clock = system_clock) -> None:
        self.toxics = Toxics()
        self.port = 0
        self.connections = 0
        self.cuts = 0
        self.passed = 0
        self._host = host
        self._to_port = port
        self._clock = clock
        self._draws = Draws(seed)
        self._server: asyncio.Server | None = None
        self._open: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        """Listen; return the port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self.port

    async def stop(self) -> None:
        """Close everything."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.reset()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.stop()

    def url(self, url: str) -> str:
        """Return a broker's URL with the proxy's address in place of its hosts."""
        return at_place(url, f"127.0.0.1:{self.port}")

    # --- what is done to connections that are open ---

    def heal(self) -> None:
        """Take all toxics away; connections of which something was lost stay as they are."""
        self.toxics = Toxics()

    def reset(self) -> None:
        """End every connection at once, by RST."""
        for connection in list(self._open):
            connection.reset()

    def swallow(self) -> None:
        """Make every connection that is open half-open: it stands, and nothing comes through; new ones work."""
        for connection in self._open:
            connection.swallowed = True

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - the server runs this in a task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        connection = self.connection(self, reader, writer, self._draws)
        self._open.add(connection)
        self.connections += 1
        try:
            if self.toxics.down:
                connection.reset()
            else:
                await connection.run(self._host, self._to_port)
        except asyncio.CancelledError:
            connection.reset()  # the proxy stops; the server would log what this task raises
        finally:
            self._open.discard(connection)

    async def _pause(self, size: int) -> None:
        """Hold a piece of `size` bytes back for as long as the toxics say."""
        toxics = self.toxics
        wait_s = toxics.latency_s
        if toxics.jitter_s:
            wait_s += self._draws.uniform(0, toxics.jitter_s)
        if toxics.bytes_per_s:
            wait_s += size / toxics.bytes_per_s
        if wait_s:
            await self._clock.sleep(wait_s)


class Connection:
    """One client's connection and the one to the broker that belongs to it.

    Attributes:
        proxy: whose it is.
        to_client: where what the broker says goes.
    """

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, draws: Draws) -> None:
        self.swallowed = False
        self.muted = False
        self.proxy = proxy
        self.to_client = writer
        self._reader = reader
        self._writers = [writer]
        limits = proxy.toxics.cut_after
        self._left = None if limits is None else draws.randint(*limits)

    async def run(self, host: str, port: int) -> None:
        """Carry both directions until one of them ends."""
        try:
            reader, writer = await asyncio.open_connection(host, port)
        except OSError:
            self.reset()  # nobody listens behind the proxy: the client sees a connection that ends at once
            return
        self._writers.append(writer)
        up = asyncio.create_task(self.pump(self._reader, writer))
        down = asyncio.create_task(self.pump(reader, self.to_client))
        try:
            await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
            down.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
            await self._close()

    async def pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        """Carry one direction until `source` ends."""
        proxy = self.proxy
        with contextlib.suppress(ConnectionError):
            while piece := await source.read(proxy.toxics.slice_bytes or CHUNK_BYTES):
                await proxy._pause(len(piece))  # noqa: SLF001 - one module
                if self.swallowed or proxy.toxics.swallow:
                    self.swallowed = True  # what is lost in the middle of a connection cannot be made good
                    continue
                if target is self.to_client and (self.muted or proxy.toxics.mute):
                    self.muted = True
                    continue
                if self._left is not None:
                    piece = piece[: self._left]
                    self._left -= len(piece)
                target.write(piece)
                proxy.passed += len(piece)
                await target.drain()
                if self._left == 0:
                    proxy.cuts += 1
                    self.reset()
                    return

    def reset(self) -> None:
        """End both ends by RST."""
        for writer in self._writers:
            opened: socket.socket | None = writer.get_extra_info("socket")
            if opened is not None and opened.fileno() >= 0:
                # RST in place of FIN: SO_LINGER on, with no time.
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _close(self) -> None:
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


Proxy.connection = Connection


def at_place(url: str, place: str) -> str:
    """Return a broker's URL with `host:port` in place of its hosts.

    >>> at_place("amqp://user:secret@one,two/shop", "127.0.0.1:9")
    'amqp://user:secret@127.0.0.1:9/shop'
    """
    head, slashes, rest = url.partition("://")
    end = min((rest.find(sign) for sign in "/?" if sign in rest), default=len(rest))
    credentials, at, _ = rest[:end].rpartition("@")
    return f"{head}{slashes}{credentials}{at}{place}{rest[end:]}"
