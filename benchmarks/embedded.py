"""The suite of the embedded engine and the core: every row of the speed table.

Read next: contestants/embedded.py and contestants/handwritten.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.cases import Case, Contestant, Goal, Row

KINDS = ("stream", "queue", "topic")

FLOOR = Contestant("msgspec + direct step", "floors:direct_step")
TASKS = Contestant("a task per message", "floors:task_per_message", options={"suspend": False})
FASTSTREAM = Contestant("FastStream, test broker", "peers:faststream", share=0.02, peer=True)
ONE_BY_ONE = Contestant("Trunkline", "memory:one_by_one", options={"suspend": False})
BATCHES = Contestant("Trunkline, publish_all", "memory:in_batches", options={"suspend": False})

MEMORY = Case(
    "memory",
    (ONE_BY_ONE, BATCHES, FLOOR, TASKS, FASTSTREAM),
    (
        Row("memory, never suspends", "cpu_us", "µs CPU", "Trunkline", FLOOR.name, Goal(4, "at most"), lower=True),
        Row("memory, never suspends", "cpu_us", "µs CPU", "Trunkline", TASKS.name, lower=True),
        Row("memory, never suspends", "cpu_us", "µs CPU", "Trunkline", FASTSTREAM.name, lower=True),
        Row(
            "memory, never suspends, published 100 at a time", "cpu_us", "µs CPU", BATCHES.name, FLOOR.name, lower=True
        ),
    ),
    messages=200_000,
    quick=20_000,
)

SUSPENDING = Case(
    "memory, suspends once",
    (
        Contestant("Trunkline", "memory:one_by_one", options={"suspend": True}),
        Contestant(TASKS.name, TASKS.target, options={"suspend": True}),
    ),
    (Row("memory, suspends once", "cpu_us", "µs CPU", "Trunkline", TASKS.name, Goal(15, "at most"), lower=True),),
    messages=100_000,
    quick=10_000,
)

WITHOUT_INBOX = Contestant("hand-written loop", "handwritten:one_process", options={"inbox": False})
WITH_INBOX = Contestant("hand-written loop with inbox", "handwritten:one_process", options={"inbox": True})

ONE_PROCESS = Case(
    "one process, 100 publishers",
    (
        *(Contestant(f"Trunkline {kind}", "embedded:one_process", options={"kind": kind}) for kind in KINDS),
        WITHOUT_INBOX,
        WITH_INBOX,
    ),
    tuple(
        Row(
            f"one process, 100 publishers, {kind}", "per_s", "/s", f"Trunkline {kind}", other.name,
            Goal(50_000) if other is WITH_INBOX else None,
        )
        for kind in KINDS
        for other in (WITH_INBOX, WITHOUT_INBOX)
    ),
    messages=100_000,
    quick=10_000,
)  # fmt: skip

RAW_PAIR = Contestant("raw loop in two processes", "handwritten:two_processes")

TWO_PROCESSES = Case(
    "producer and consumer process",
    (
        *(Contestant(f"Trunkline {kind}", "embedded:two_processes", options={"kind": kind}) for kind in KINDS),
        RAW_PAIR,
    ),
    tuple(
        Row(f"producer and consumer process, {kind}", "per_s", "/s", f"Trunkline {kind}", RAW_PAIR.name, Goal(30_000))
        for kind in KINDS
    ),
    messages=100_000,
    quick=10_000,
)

RAW_COMMITS = Contestant("raw SQLite commits", "handwritten:one_commit_each")

ONE_AT_A_TIME = Case(
    "one publish at a time",
    (Contestant("Trunkline", "embedded:one_at_a_time"), RAW_COMMITS),
    (
        Row("one publish at a time", "per_s", "/s", "Trunkline", RAW_COMMITS.name, Goal(0.8, of="ratio")),
        Row("one publish at a time, p99 / p50", "p99_over_p50", "×", "Trunkline", RAW_COMMITS.name,
            Goal(5, "at most"), lower=True),
        Row("one publish at a time, p50", "p50_us", "µs", "Trunkline", RAW_COMMITS.name, lower=True),
    ),
    messages=10_000,
    quick=2_000,
)  # fmt: skip

RAW_HANDLER = Contestant("raw loop, 64 per commit", "handwritten:handler_with_insert")

HANDLER = Case(
    "handler with own INSERT and one message",
    (Contestant("Trunkline", "embedded:handler_with_insert"), RAW_HANDLER),
    (
        Row("handler with own INSERT and one message, 64 in flight", "per_s", "/s", "Trunkline", RAW_HANDLER.name,
            Goal(8_000)),
    ),
    messages=40_000,
    quick=5_000,
)  # fmt: skip

PEERS = (
    Contestant("persist-queue", "peers:persist_queue", share=0.1, peer=True),
    Contestant("litequeue", "peers:litequeue", share=0.1, peer=True),
    Contestant("huey", "peers:huey", share=0.1, peer=True),
    Contestant("PostgreSQL", "postgres:end_to_end", peer=True, needs=("postgres",)),
    Contestant("Redis Streams", "redis:end_to_end", peer=True, needs=("redis-server",)),
    Contestant("NATS JetStream", "nats:end_to_end", share=0.4, peer=True),
    Contestant("RabbitMQ quorum queue", "rabbitmq:end_to_end", share=0.2, peer=True, needs=("rabbitmq-server",)),
)

SIDE_BY_SIDE = Case(
    "durable, end to end",
    (Contestant("Trunkline stream", "embedded:one_process", options={"kind": "stream"}), *PEERS),
    tuple(
        Row("durable, end to end", "per_s", "/s", "Trunkline stream", name, Goal(1, of="ratio"))
        for name in (peer.name for peer in PEERS)
    ),
    messages=50_000,
    quick=5_000,
)


def _full_file(name: str, target: str, *rows: tuple[str, str, Goal | None]) -> Case:
    full = Contestant("full file", target, options={"full": True})
    empty = Contestant("empty file", target, options={"full": False})
    return Case(
        name,
        (full, empty),
        (
            *(Row(f"{name}{what}", metric, "/s", full.name, empty.name, goal) for what, metric, goal in rows),
            Row(f"{name}, memory", "rss_mib", "MiB more", full.name, empty.name, Goal(64, "at most"), difference=True),
        ),
        messages=1_000_000,
        quick=50_000,
        prepare="large:make",
    )


QUEUED = "1,000,000 queued, 10,000 delayed, 1,000 parked keys"
BESIDE = _full_file(f"{QUEUED}: beside them", "large:beside", ("", "per_s", Goal(0.8, of="ratio")))
WORKING_OFF = _full_file(
    f"{QUEUED}: working them off", "large:working_off",
    (", handled", "handled_per_s", Goal(0.8, of="ratio")), (", published meanwhile", "per_s", None),
)  # fmt: skip

AFTER_KILL = Case(
    "start after kill -9",
    (
        Contestant("full file", "start:after_kill", options={"full": True}),
        Contestant("20,000 messages", "start:after_kill", options={"full": False}),
    ),
    (
        Row("start after kill -9, 1,000,000 queued, to the first handled", "s", "s", "full file", "20,000 messages",
            Goal(2, "at most"), lower=True),
    ),
    messages=1_000_000,
    quick=50_000,
    prepare="large:make",
)  # fmt: skip

BARE = Contestant("bare interpreter", "start:command", options={"arguments": [Path(sys.executable).name, "-c", "pass"]})
IMPORT = Contestant(
    "import trunkline", "start:command", options={"arguments": [Path(sys.executable).name, "-c", "import trunkline"]}
)
HELP = Contestant("trunkline --help", "start:command", options={"arguments": ["trunkline", "--help"]})

IMPORTS = Case(
    "imports",
    (IMPORT, HELP, BARE),
    (
        Row("import trunkline, whole process", "ms", "ms", IMPORT.name, BARE.name, Goal(150, "at most"), lower=True),
        Row("import trunkline, above the bare interpreter", "ms", "ms", IMPORT.name, BARE.name, difference=True),
        Row("trunkline --help, whole process", "ms", "ms", HELP.name, BARE.name, Goal(300, "at most"), lower=True),
        Row("trunkline --help, above the bare interpreter", "ms", "ms", HELP.name, BARE.name, difference=True),
    ),
    messages=1,
    quick=1,
    rounds=10,
)

CASES = (
    MEMORY, SUSPENDING, ONE_PROCESS, TWO_PROCESSES, ONE_AT_A_TIME, HANDLER, SIDE_BY_SIDE, BESIDE, WORKING_OFF,
    AFTER_KILL, IMPORTS,
)  # fmt: skip
