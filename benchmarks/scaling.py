"""The suite of scaling: one backlog, worked off by more processes of a service, and by one process with more lanes.

Each figure is compared with one process, or one lane, on the same broker. Kafka and JetStream carry a Stream with 8
partitions, the others a Queue, as in brokers.py. Read next: contestants/sharing.py.
"""

from __future__ import annotations

from typing import Any

from benchmarks.cases import Case, Contestant, Row

PROCESSES = (1, 2, 4)
LANES = {1: 0.025, 8: 0.2, 64: 1.0}
"""Lanes, and the part of the messages for so many."""
MESSAGES = 20_000
"""For 64 lanes."""
WAIT_S = 0.001
"""What a handler waits for where lanes are compared."""
BROKERS: tuple[tuple[str, str | None, int, dict[str, Any]], ...] = (
    ("Kafka Stream", "kafka", 100_000, {"kind": "stream", "store": "none:", "file": False}),
    ("JetStream Stream", "nats", 50_000, {"kind": "stream", "store": "none:", "file": False}),
    ("Redis Queue", "redis", 50_000, {"kind": "queue", "store": "none:", "file": False}),
    ("RabbitMQ Queue", "rabbitmq", 50_000, {"kind": "queue", "store": "none:", "file": False}),
    ("PostgreSQL Queue", "postgres", 30_000, {"kind": "queue", "store": "own", "file": False}),
    ("SQLite Queue", None, 30_000, {"kind": "queue", "store": "own", "file": True}),
)
"""Name, server, messages for processes, and what the contestants are told."""


def _processes(broker: str, server: str | None, messages: int, options: dict[str, Any]) -> Case:
    contestants = [
        Contestant(
            "1 process" if number == 1 else f"{number} processes",
            "sharing:consume",
            options={**options, "processes": number, "lanes": 64, "wait_s": 0.0},
        )
        for number in PROCESSES
    ]
    return _case(f"{broker}, processes", broker, server, messages, contestants)


def _lanes(broker: str, server: str | None, _messages: int, options: dict[str, Any]) -> Case:
    contestants = [
        Contestant(
            "1 lane" if number == 1 else f"{number} lanes",
            "sharing:consume",
            share,
            options={**options, "processes": 1, "lanes": number, "wait_s": WAIT_S},
        )
        for number, share in LANES.items()
    ]
    return _case(f"{broker}, lanes", broker, server, MESSAGES, contestants)


def _case(name: str, broker: str, server: str | None, messages: int, contestants: list[Contestant]) -> Case:
    one, *more = (contestant.name for contestant in contestants)
    rows = [Row(f"{broker}, {subject}", "per_s", "/s", subject, one) for subject in more]
    prepare = server and f"broker:start_{server}"
    return Case(name, contestants, rows, messages, messages // 10, rounds=3, prepare=prepare)


CASES = (*(_processes(*broker) for broker in BROKERS), *(_lanes(*broker) for broker in BROKERS))
