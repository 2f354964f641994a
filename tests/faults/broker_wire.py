"""The least of each broker's protocol that leaves something durable behind and finds it again.

Written by hand so that the servers are tested without any client's retries.
"""

import json
import socket
import struct
import subprocess
from urllib.parse import urlsplit

from scripts.brokers.kafka import METADATA, request, response
from scripts.brokers.kind import receive
from scripts.brokers.packages import need
from scripts.brokers.postgres import FOLDERS

MARK = "mark"
CREATE_TOPICS = 19


def _connect(url: str) -> socket.socket:
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout=10)


class Wire:
    """What the brokers have in common."""

    @staticmethod
    def is_written(_data):
        """Say whether what was confirmed is in the files below the folder `data`: most write before they confirm."""
        return True


class Redis(Wire):
    """A key."""

    @staticmethod
    def write(url):
        with _connect(url) as peer:
            peer.sendall(f"SET {MARK} 1\r\n".encode())
            assert peer.recv(64) == b"+OK\r\n"

    @staticmethod
    def is_there(url):
        with _connect(url) as peer:
            peer.sendall(f"GET {MARK}\r\n".encode())
            return peer.recv(64) == b"$1\r\n1\r\n"


class Postgres(Wire):
    """A table."""

    @staticmethod
    def _ask(url, sql):
        psql = [need("psql", "postgresql", *FOLDERS), "-qtAX", "-v", "ON_ERROR_STOP=1", url, "-c", sql]
        return subprocess.run(psql, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()

    @classmethod
    def write(cls, url):
        cls._ask(url, f"CREATE TABLE {MARK} (n int)")

    @classmethod
    def is_there(cls, url):
        return cls._ask(url, f"SELECT to_regclass('{MARK}') IS NOT NULL") == "t"


class Nats(Wire):
    """A stream with one message."""

    @staticmethod
    def _ask(url, subject, body=b""):
        with _connect(url) as peer, peer.makefile("rb") as lines:
            lines.readline()  # INFO
            peer.sendall(b'CONNECT {"verbose":false}\r\nSUB inbox 1\r\n')
            peer.sendall(f"PUB {subject} inbox {len(body)}\r\n".encode() + body + b"\r\n")
            size = int(lines.readline().split()[-1])
            return json.loads(lines.read(size))

    @classmethod
    def write(cls, url):
        stream = {"name": MARK, "subjects": [f"{MARK}.>"], "storage": "file"}
        assert "error" not in cls._ask(url, f"$JS.API.STREAM.CREATE.{MARK}", json.dumps(stream).encode())
        assert cls._ask(url, f"{MARK}.one", b"1")["seq"] == 1

    @classmethod
    def is_there(cls, url):
        return cls._ask(url, f"$JS.API.STREAM.INFO.{MARK}").get("state", {}).get("messages") == 1


class RabbitMQ(Wire):
    """A durable queue (AMQP 0-9-1, 1.4 and 1.7)."""

    @staticmethod
    def _send(peer, channel, method, arguments=b""):
        payload = struct.pack(">HH", *method) + arguments
        peer.sendall(struct.pack(">BHI", 1, channel, len(payload)) + payload + b"\xce")

    @staticmethod
    def _method(peer):
        _, _, size = struct.unpack(">BHI", receive(peer, 7))
        return struct.unpack_from(">HH", receive(peer, size + 1))

    @staticmethod
    def _short(text):
        return bytes([len(text)]) + text.encode()

    @classmethod
    def _declare(cls, url, bits):
        """Return whether the queue was declared; the first bit means passive, the second durable."""
        with _connect(url) as peer:
            peer.sendall(b"AMQP\x00\x00\x09\x01")
            assert cls._method(peer) == (10, 10)
            login = struct.pack(">I", 12) + b"\0guest\0guest"
            cls._send(peer, 0, (10, 11), bytes(4) + cls._short("PLAIN") + login + cls._short("en_US"))
            assert cls._method(peer) == (10, 30)
            cls._send(peer, 0, (10, 31), struct.pack(">HIH", 10, 131072, 0))
            cls._send(peer, 0, (10, 40), cls._short("/") + bytes(2))
            assert cls._method(peer) == (10, 41)
            cls._send(peer, 1, (20, 10), bytes(1))
            assert cls._method(peer) == (20, 11)
            cls._send(peer, 1, (50, 10), bytes(2) + cls._short(MARK) + bytes([bits]) + bytes(4))
            return cls._method(peer) == (50, 11)

    @classmethod
    def write(cls, url):
        assert cls._declare(url, 0b10)

    @staticmethod
    def is_written(data):
        # Mnesia may hold back what it writes, for up to 2 s: 1 in 40 queues was declared and lost. Its log tells the
        # change first and then that it is committed: 1 in 20 killed between the two was lost too.
        name = b"m" + struct.pack(">I", len(MARK)) + MARK.encode()  # a binary, Erlang's external term format
        for file in data.glob("*/*.[LD][OC]*"):
            _, found, later = file.read_bytes().partition(name)
            if found and (file.suffix != ".LOG" or b"committed" in later):
                return True
        return False

    @classmethod
    def is_there(cls, url):
        return cls._declare(url, 0b01)


class Kafka(Wire):
    """A topic."""

    @staticmethod
    def _ask(url, api, version, body):
        with _connect(url) as peer:
            peer.sendall(request(api, version, body))
            return response(peer)

    @classmethod
    def write(cls, url):
        name = struct.pack(">h", len(MARK)) + MARK.encode()
        topic = name + struct.pack(">ihii", 1, 1, 0, 0)  # 1 partition, 1 copy, no assignments, no settings
        answer = cls._ask(url, CREATE_TOPICS, 2, struct.pack(">i", 1) + topic + struct.pack(">ib", 10_000, 0))
        (error,) = struct.unpack_from(">h", answer, 4 + 4 + len(name))  # after throttle time, count, name
        assert error == 0

    @classmethod
    def is_there(cls, url):
        everything = struct.pack(">i", -1)
        return MARK.encode() in cls._ask(url, METADATA, 1, everything)


WIRES = {"redis": Redis, "postgres": Postgres, "nats": Nats, "rabbitmq": RabbitMQ, "kafka": Kafka}
