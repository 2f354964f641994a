"""A message as JetStream brings it, to a Delivery.

Invariant: whatever bytes come, the answer is a Delivery; what cannot be read keeps its bytes.
Read next: queues.py.
"""

from __future__ import annotations

from trunkline.errors import DecodeError
from trunkline.message import Message
from trunkline.transport import LIVE, Delivery, Subscription
from trunkline.transports.nats.connection import parse_headers
from trunkline.wire import Plain, decode, why_unread


def delivery(
    subscription: Subscription, position: int, partition: int, moment: bytes, data: bytes, headers: bytes | None,
    *, suspect: bool,
) -> Delivery:  # fmt: skip
    """Return what `subscription` is handed.

    Args:
        moment: nanoseconds since the epoch at which the server stored it.
    """
    try:
        message = _read(subscription, position, moment, data, headers)
    except DecodeError as error:
        unread = why_unread(error)
        return Delivery(subscription, None, data, None, position, partition, suspect=suspect, unread=unread)
    return Delivery(subscription, message, None, message.partitionkey, position, partition, 0, LIVE, suspect)


def _read(subscription: Subscription, position: int, moment: bytes, data: bytes, headers: bytes | None) -> Message:
    try:
        return decode(data, lambda: parse_headers(headers))
    except DecodeError:
        channel = subscription.channel
        if channel.plain is None:
            raise
    source, identity, seconds = f"nats:{channel.name}", f"{channel.name}:{position}:{int(moment)}", int(moment) / 1e9
    return decode(data, lambda: parse_headers(headers), Plain(channel.plain, source, identity, seconds))
