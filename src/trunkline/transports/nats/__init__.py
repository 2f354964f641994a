"""Channels on NATS JetStream, 2.11 or later; see transport.py."""

from __future__ import annotations

from trunkline.transports.nats.transport import NatsTransport

__all__ = ["NatsTransport"]
