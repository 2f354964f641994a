"""The suite of the brokers: Trunkline on each of them beside the raw client and FastStream, in the same run.

Raw clients are used in the shape that suits them best, batches where they have them; what every contestant does is in
its docstring. Read next: contestants/trunkline_on_brokers.py.
"""

from __future__ import annotations

from benchmarks.cases import Case, Contestant, Goal, Row

FASTSTREAM = "FastStream"
OVERHEAD_US = 8.0
"""Most CPU time that Trunkline may need above the raw client for one message."""


def _consume(  # noqa: PLR0913 - one line per broker below
    broker: str, module: str, raw: str, kind: str, messages: int, *, ratio: float, per_s: float | None = None,
    faststream: float | None = None, share: float = 0.05,
) -> Case:  # fmt: skip
    """Return the case of a broker that hands over a backlog."""
    name = f"{broker}, consumed"
    contestants = [
        Contestant("Trunkline", "trunkline_on_brokers:consume", options={"kind": kind, "store": "none:"}),
        Contestant(
            "Trunkline, inbox in SQLite", "trunkline_on_brokers:consume", options={"kind": kind, "store": "sqlite"}
        ),
        Contestant(raw, f"{module}:raw_consume", peer=True),
    ]
    rows = [
        Row(name, "per_s", "/s", "Trunkline", raw, Goal(ratio, of="ratio")),
        Row(f"{name}, inbox in SQLite", "per_s", "/s", "Trunkline, inbox in SQLite", raw),
        Row(
            f"{name}, CPU above the raw client",
            "cpu_us",
            "µs CPU",
            "Trunkline",
            raw,
            Goal(OVERHEAD_US, "at most"),
            difference=True,
        ),
    ]
    if per_s is not None:
        rows.append(Row(name, "per_s", "/s", "Trunkline", goal=Goal(per_s)))
    if module == "postgres_queue":
        own = "Trunkline, inbox in PostgreSQL"
        contestants.append(Contestant(own, "trunkline_on_brokers:consume", options={"kind": kind, "store": "own"}))
        rows.append(Row(f"{name}, inbox in PostgreSQL", "per_s", "/s", own, raw))
    if faststream is not None:
        contestants.append(Contestant(FASTSTREAM, f"{module}:faststream_consume", share=share, peer=True))
        rows.append(Row(name, "per_s", "/s", "Trunkline", FASTSTREAM, Goal(faststream, of="ratio")))
    return Case(name, contestants, rows, messages, messages // 10, rounds=3, prepare=f"broker:start_{_server(module)}")


def _publish(  # noqa: PLR0913 - as above
    broker: str, module: str, raw: str, kind: str, messages: int, *, ratio: float | None = None,
    per_s: float | None = None, faststream: bool = True, share: float = 0.2,
) -> Case:  # fmt: skip
    """Return the case of 100 callers that publish to a broker."""
    name = f"{broker}, published by 100"
    contestants = [
        Contestant("Trunkline", "trunkline_on_brokers:publish", options={"kind": kind}),
        Contestant(raw, f"{module}:raw_publish", peer=True),
    ]
    rows = [Row(name, "per_s", "/s", "Trunkline", raw, None if ratio is None else Goal(ratio, of="ratio"))]
    if per_s is not None:
        rows.append(Row(name, "per_s", "/s", "Trunkline", goal=Goal(per_s)))
    if faststream:
        contestants.append(Contestant(FASTSTREAM, f"{module}:faststream_publish", share=share, peer=True))
        rows.append(Row(name, "per_s", "/s", "Trunkline", FASTSTREAM))
    return Case(name, contestants, rows, messages, messages // 10, rounds=3, prepare=f"broker:start_{_server(module)}")


def _server(module: str) -> str:
    return module.removesuffix("_queue")


CASES = (
    _consume(
        "Kafka",
        "kafka",
        "confluent-kafka, batches",
        "stream",
        400_000,
        ratio=0.4,
        per_s=150_000,
        faststream=40,
        share=0.02,
    ),
    _publish("Kafka", "kafka", "confluent-kafka", "stream", 100_000, per_s=100_000),
    _consume("JetStream", "nats", "nats-py, push", "stream", 100_000, ratio=0.6, faststream=3, share=0.2),
    Case(
        "JetStream work queue, consumed",
        (
            Contestant("Trunkline", "trunkline_on_brokers:consume", options={"kind": "queue", "store": "none:"}),
            Contestant("nats-py, push", "nats:raw_consume", peer=True, options={"retention": "workqueue"}),
        ),
        (Row("JetStream work queue, consumed", "per_s", "/s", "Trunkline", "nats-py, push", Goal(0.6, of="ratio")),),
        20_000,
        2_000,
        rounds=3,
        prepare="broker:start_nats",
    ),
    _publish("JetStream", "nats", "nats-py", "stream", 50_000, ratio=0.85),
    _consume("Redis Streams", "redis", "redis-py, batches", "queue", 50_000, ratio=0.8, faststream=9),
    _publish("Redis Streams", "redis", "redis-py, pipeline of 100", "queue", 50_000, ratio=0.8),
    _consume("RabbitMQ", "rabbitmq", "aiormq, multiple acks", "queue", 30_000, ratio=0.8, faststream=3, share=0.3),
    _publish("RabbitMQ", "rabbitmq", "aiormq", "queue", 20_000, ratio=0.8),
    _consume("PostgreSQL", "postgres_queue", "asyncpg, batches of 1,000", "queue", 50_000, ratio=0.6),
    _publish("PostgreSQL", "postgres_queue", "asyncpg, batches of 100", "queue", 50_000, ratio=0.7, faststream=False),
)
