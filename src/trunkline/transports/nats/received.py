"""A message as JetStream brings it, to a Delivery.

Invariant: whatever bytes come, the answer is a Delivery; what cannot be read keeps its bytes.
Read next: queues.py.
"""

from __future__ import annotations

from trunkline.errors import DecodeError
from trunkline.message import Message
from trunkline.transport import LIVE, Delivery, Subscription
from trunkline.transports.nats.connection import parse_headers
from trunkline.wire import Plain, decode


def delivery(
    subscription: Subscription, position: int, partition: int, moment: bytes, data: bytes, headers: bytes | None,
    *, suspect: bool,
) -> Delivery:  # fmt: skip
    """Return what `subscription` is handed.

    Args:
        moment: nanoseconds since the epoch at which the server stored it.
    """
    raw: bytes | None = None
    message: Message | None
    try:
        message = decode(data, lambda: parse_headers(headers))
    except DecodeError:
        message = _plain(subscription, position, moment, data, headers)
        if message is None:
            raw = data
    key = None if message is None else message.partitionkey
    return Delivery(subscription, message, raw, key, position, partition, 0, LIVE, suspect)


def _plain(
    subscription: Subscription, position: int, moment: bytes, data: bytes, headers: bytes | None
) -> Message | None:
    channel = subscription.channel
    if channel.plain is None:
        return None
    plain = Plain(channel.plain, f"nats:{channel.name}", f"{channel.name}:{position}:{int(moment)}", int(moment) / 1e9)
    try:
        return decode(data, lambda: parse_headers(headers), plain)
    except DecodeError:
        return None
