"""Whether a port asks who is there: librdkafka says only that the connection was closed.

Blocks, and is called in a worker thread. Never does: sign in. Read next: cluster.py.
Source: Kafka protocol guide, SaslHandshake (api key 17, version 1): a port with SASL names its mechanisms, also to who
asks for none of them; one without says that it is not the time for that and names none.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import Mapping
from typing import Any

PROBE_S = 2.0
_SASL_HANDSHAKE = struct.pack(">hhi", 17, 1, 1) + struct.pack(">h", 9) + b"trunkline" + struct.pack(">h", 0)
_LONGEST = 4096


def mechanisms_asked_for(client: Mapping[str, Any]) -> list[str]:
    """Return the SASL mechanisms of the first bootstrap server that answers, or none if it asks for none."""
    for place in str(client["bootstrap.servers"]).split(","):
        host, _, port = place.rpartition(":")
        with contextlib.suppress(OSError, struct.error, ValueError):
            return _ask(host.strip("[]"), int(port), client)
    return []


def _ask(host: str, port: int, client: Mapping[str, Any]) -> list[str]:
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(socket.create_connection((host, port), PROBE_S))
        if "SSL" in client["security.protocol"]:
            context = ssl.create_default_context(cafile=client.get("ssl.ca.location"))
            peer = stack.enter_context(context.wrap_socket(peer, server_hostname=host))
        peer.sendall(struct.pack(">i", len(_SASL_HANDSHAKE)) + _SASL_HANDSHAKE)
        (size,) = struct.unpack(">i", _exactly(peer, 4))
        answer = _exactly(peer, min(size, _LONGEST))
    _correlation, _error, count = struct.unpack_from(">ihi", answer)
    found, at = [], 10
    for _ in range(count):
        (length,) = struct.unpack_from(">h", answer, at)
        found.append(answer[at + 2 : at + 2 + length].decode("ascii"))
        at += 2 + length
    return found


def _exactly(peer: socket.socket, size: int) -> bytes:
    """Return so many bytes. Raises: ConnectionError if the peer closes before."""
    found = b""
    while len(found) < size:
        if not (part := peer.recv(size - len(found))):
            raise ConnectionError("closed")
        found += part
    return found
