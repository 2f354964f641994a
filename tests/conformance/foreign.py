"""How another program publishes to the channels of each broker, for the suite's foreign cases: scheme → function.

Each takes the URL of the App under test, a channel, a body and headers: `content-type`, and attributes of a CloudEvent
under their own names, which go where the broker's binding has them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import parse_qs, urlsplit

from trunkline.channel import Channel


def prefix_of(url: str) -> str:
    return parse_qs(urlsplit(url).query)["prefix"][0]


def prefixed(headers: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name if name == "content-type" else prefix + name: value for name, value in headers.items()}


async def kafka(url: str, channel: Channel, body: bytes, headers: dict[str, str]) -> None:
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": urlsplit(url).netloc.rpartition("@")[2]})
    producer.produce(f"{prefix_of(url)}.{channel.name}", body, headers=list(prefixed(headers, "ce_").items()))
    assert await asyncio.to_thread(producer.flush, 20) == 0


async def nats(url: str, channel: Channel, body: bytes, headers: dict[str, str]) -> None:
    import nats as client

    connection = await client.connect(url.partition("?")[0])
    try:
        subject = f"{prefix_of(url)}.{channel.kind[0]}.{channel.name}"
        if channel.kind == "stream":
            subject += ".0"
        await connection.jetstream().publish(subject, body, headers=prefixed(headers, "ce-") or None)
    finally:
        await connection.close()


async def rabbitmq(url: str, channel: Channel, body: bytes, headers: dict[str, str]) -> None:
    import aio_pika

    connection = await aio_pika.connect(url.partition("?")[0])
    async with connection:
        opened = await connection.channel()
        name = f"{prefix_of(url)}.{channel.name}"
        exchange = await opened.get_exchange(name, ensure=False)
        attributes = {key: value for key, value in headers.items() if key != "content-type"}
        message = aio_pika.Message(
            body, headers=prefixed(attributes, "cloudEvents:"), content_type=headers.get("content-type")
        )
        await exchange.publish(message, "0" if channel.kind == "stream" else name)


PUBLISHERS: dict[str, Callable[[str, Channel, bytes, dict[str, str]], Awaitable[None]]] = {
    "amqp": rabbitmq,
    "kafka": kafka,
    "nats": nats,
}
