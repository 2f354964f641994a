"""The chaos proxy: what passes is unchanged, what is spoilt is spoilt as it was asked for."""

import asyncio
import contextlib

import pytest

from trunkline.testing.proxy import Proxy


@contextlib.asynccontextmanager
async def echo():
    """A server that sends back what it gets, and the proxy before it."""

    async def serve(reader, writer):
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65536):
                writer.write(piece)
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, Proxy("127.0.0.1", server.sockets[0].getsockname()[1], seed=3) as proxy:
        yield proxy


@contextlib.asynccontextmanager
async def connected(proxy):
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_without_toxics_every_byte_passes():
    data = bytes(range(256)) * 4000
    async with echo() as proxy, connected(proxy) as (reader, writer):
        writer.write(data)
        assert await reader.readexactly(len(data)) == data
        assert proxy.connections == 1
        assert proxy.passed >= 2 * len(data)


async def test_latency_is_waited_for_in_both_directions():
    async with echo() as proxy, connected(proxy) as (reader, writer):
        proxy.toxics.latency_s = 0.05
        began = asyncio.get_running_loop().time()
        writer.write(b"x")
        await reader.readexactly(1)
        assert asyncio.get_running_loop().time() - began >= 0.1


async def test_slices_are_no_longer_than_asked():
    async with echo() as proxy:
        proxy.toxics.slice_bytes = 3
        proxy.toxics.latency_s = 0.005
        async with connected(proxy) as (reader, writer):
            writer.write(b"0123456789")
            pieces = []
            while sum(map(len, pieces)) < 10:
                pieces.append(await reader.read(100))
    assert b"".join(pieces) == b"0123456789"
    assert max(map(len, pieces)) <= 6  # two may have been waiting


async def test_bandwidth_is_limited():
    async with echo() as proxy, connected(proxy) as (reader, writer):
        proxy.toxics.bytes_per_s = 20_000
        began = asyncio.get_running_loop().time()
        writer.write(bytes(2000))
        await reader.readexactly(2000)
        assert asyncio.get_running_loop().time() - began >= 0.2


async def test_a_connection_is_reset_after_the_bytes_that_were_drawn():
    async with echo() as proxy:
        proxy.toxics.cut_after = (10, 10)
        async with connected(proxy) as (reader, writer):
            writer.write(bytes(100))
            with pytest.raises(ConnectionResetError):
                await reader.read()
        assert proxy.cuts == 1
        assert proxy.passed == 10


async def test_reset_ends_all_connections_by_rst():
    async with echo() as proxy, connected(proxy) as (reader, writer):
        writer.write(b"x")
        await reader.readexactly(1)
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)


async def test_a_half_open_connection_stands_and_says_nothing_while_new_ones_work():
    async with echo() as proxy, connected(proxy) as (reader, writer):
        writer.write(b"x")
        await reader.readexactly(1)
        proxy.swallow()
        writer.write(b"y")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await reader.read(1)
        async with connected(proxy) as (other, others_writer):
            others_writer.write(b"z")
            assert await other.readexactly(1) == b"z"


async def test_a_muted_broker_hears_and_is_not_heard():
    async with echo() as proxy, connected(proxy) as (reader, writer):
        proxy.toxics.mute = True
        writer.write(b"unheard")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        assert proxy.passed == len(b"unheard")
        proxy.heal()
        writer.write(b"still unheard")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        async with connected(proxy) as (other, others_writer):
            others_writer.write(b"x")
            assert await other.readexactly(1) == b"x"


async def test_down_refuses_new_connections_and_heal_lets_them_in_again():
    async with echo() as proxy:
        proxy.toxics.down = True
        async with connected(proxy) as (reader, writer):
            with contextlib.suppress(ConnectionError):
                assert await reader.read(1) == b""
        proxy.heal()
        async with connected(proxy) as (reader, writer):
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"


async def test_nobody_behind_the_proxy_ends_the_connection():
    async with Proxy("127.0.0.1", 1) as proxy, connected(proxy) as (reader, _writer):
        with contextlib.suppress(ConnectionError):
            assert await reader.read(1) == b""


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("amqp://user:p%40ss@host:5672/vhost?x=1", "amqp://user:p%40ss@127.0.0.1:{}/vhost?x=1"),
        ("nats://one:1,two:2", "nats://127.0.0.1:{}"),
        ("redis://host?prefix=a/b", "redis://127.0.0.1:{}?prefix=a/b"),
    ],
)
async def test_the_url_leads_through_the_proxy_and_keeps_the_rest(url, wanted):
    async with Proxy("127.0.0.1", 1) as proxy:
        assert proxy.url(url) == wanted.format(proxy.port)
