"""Cases of messages that cannot be handled: undecodable, unknown, failing; and of messages from other programs.

Read next: registry.py.
"""

from __future__ import annotations

from typing import Any

from trunkline.handler import Context
from trunkline.message import Message
from trunkline.policies.retry import Retry
from trunkline.testing.conformance.bench import Bench, equal, must
from trunkline.testing.conformance.registry import Group
from trunkline.testing.lines import Line
from trunkline.transport import Staged

core = Group("core")
load = Group("load")
ONCE = Retry(immediate=0, delays_s=())


def envelope(bench: Bench, line: Line, data: bytes, type: str = "numbered", key: str | None = None) -> Staged:  # noqa: A002
    """Return any payload on its way to a line."""
    message = Message(bench.clock.new_id(), type, "conformance", data, bench.clock.now(), key)
    return Staged(line.channel, message)


@core.case()
async def undecodable_to_dlq(bench: Bench) -> None:
    """A payload that is not what its type says becomes a dead letter at once; what is behind it goes on."""
    jobs = bench.line()
    reader = bench.reader(jobs)
    app = await bench.start(reader)
    bad = envelope(bench, jobs, b'{"producer": 1}')
    await bench.send_staged(app, [bad])
    await app.publish(jobs.message(1))
    await bench.until(lambda: reader.seen, "the next one was not handled")
    (letter,) = await bench.until(lambda: bench.dead_letters(app), "there is no dead letter")
    equal(letter.message_id, bad.message.id, "dead letter")
    must(letter.code.startswith("E4"), f"its code is {letter.code}")
    await bench.idle(app)


@core.case()
async def unknown_type(bench: Bench) -> None:
    """A type without handler is a dead letter on a Queue, and passes by on a Topic or Stream."""
    lines = [bench.line("queue"), bench.line("topic"), bench.line("stream")]
    reader = bench.reader(*lines)
    app = await bench.start(reader)
    for line in lines:
        await bench.send_staged(app, [envelope(bench, line, b"{}", "never.heard.of", "a")])
        await app.publish(line.message(1))
    await bench.until(lambda: len(reader.seen) >= 3, lambda: f"{len(reader.seen)} of 3 were handled")
    (letter,) = await bench.until(lambda: bench.dead_letters(app), "there is no dead letter")
    equal(letter.code, "E415", "its code")
    await bench.idle(app)


@core.case("keeps")
async def dlq_reason_and_redrive(bench: Bench) -> None:
    """A dead letter says why, and comes back with its envelope when it is redriven."""
    jobs = bench.line()
    broken = [True]

    async def act(_job: Any, _ctx: Context) -> None:
        if broken[0]:
            raise ValueError("no price for orange")

    reader = bench.reader(jobs, act=act, retry=ONCE)
    app = await bench.start(reader)
    await app.publish(jobs.message(1, text="orange"), subject="prices")
    (letter,) = await bench.until(lambda: bench.dead_letters(app), "there is no dead letter")
    equal((letter.code, letter.reason), ("handler", "ValueError: no price for orange"), "dead letter")
    await bench.idle(app)
    broken[0] = False
    await app.store.redrive(letter.number)
    await bench.until(lambda: reader.seen, "it was not handled after the redrive")
    equal(reader.seen, [jobs.message(1, text="orange")], "payload")
    equal((reader.messages[-1].id, reader.messages[-1].subject), (letter.message_id, "prices"), "envelope")
    await bench.until(lambda: no_dead_letters(bench, app), "it is still a dead letter")


async def no_dead_letters(bench: Bench, app: Any) -> bool:
    """Return whether there are none."""
    return not await bench.dead_letters(app)


@load.case()
async def poison_does_not_block(bench: Bench) -> None:
    """Messages that always fail end as dead letters while all others are handled."""
    jobs = bench.line()

    async def act(job: Any, _ctx: Context) -> None:
        if job.seq % 10 == 0:
            raise ValueError("poison")

    reader = bench.reader(jobs, act=act, retry=Retry(immediate=2, delays_s=(0.1, 0.1), jitter=0))
    app = await bench.start(reader)
    await app.publish_all(jobs.messages(100))
    await bench.until(lambda: len(reader.seen) >= 90, lambda: f"{len(reader.seen)} of 90 were handled")

    async def ten() -> bool:
        return len(await bench.dead_letters(app)) >= 10

    await bench.until(ten, "there are no 10 dead letters")
    await bench.idle(app)
    await bench.quiet()
    equal(len(await bench.dead_letters(app)), 10, "dead letters")
    equal(len(reader.begun), 90 + 10 * 5, "tries")


# --- what other programs publish ---


@core.case("foreign", "publish_foreign")
async def foreign_plain_mode(bench: Bench) -> None:
    """What another program publishes without CloudEvents is taken for the channel's `plain` type."""
    lines = [bench.line(kind, plain="numbered") for kind in ("queue", "topic", "stream")]
    reader = bench.reader(*lines)
    await bench.start(reader)
    for line in lines:
        body = f'{{"producer": "{line.name}", "key": "a", "seq": 1}}'.encode()
        await bench.publish_foreign(line, body, {})
    await bench.until(lambda: len(reader.seen) >= 3, lambda: f"{len(reader.seen)} of 3 were handled")
    equal(sorted(one.producer for one in reader.seen), sorted(line.name for line in lines), "channels")


@core.case("foreign", "publish_foreign")
async def foreign_binary_mode(bench: Bench) -> None:
    """What another program publishes as a CloudEvent, in binary or structured mode, is read as one."""
    jobs = bench.line()
    reader = bench.reader(jobs)
    await bench.start(reader)
    data = b'{"producer": "p", "key": "a", "seq": 1}'
    attributes = {
        "specversion": "1.0",
        "id": "foreign-1",
        "type": "numbered",
        "source": "urn:other",
        "shopregion": "EU",
    }
    await bench.publish_foreign(jobs, data, {**attributes, "content-type": "application/json"})
    structured = b'{"specversion":"1.0","id":"foreign-2","type":"numbered","source":"urn:other","data":%b}' % data
    await bench.publish_foreign(jobs, structured, {"content-type": "application/cloudevents+json"})
    await bench.until(lambda: len(reader.seen) >= 2, lambda: f"{len(reader.seen)} of 2 were handled")
    found = {message.id: message for message in reader.messages}
    equal(set(found), {"foreign-1", "foreign-2"}, "ids")
    equal((found["foreign-1"].source, found["foreign-1"].extensions), ("urn:other", {"shopregion": "EU"}), "attributes")


@core.case("foreign", "publish_foreign", "keeps")
async def foreign_garbage_to_dlq(bench: Bench) -> None:
    """What another program publishes and nobody can read becomes a dead letter with its bytes and what is wrong."""
    jobs = bench.line()
    reader = bench.reader(jobs)
    app = await bench.start(reader)
    await bench.publish_foreign(jobs, b"\xff\x00 no event", {})
    nameless = b'{"specversion":"1.0","type":"numbered","source":"urn:other","data":{}}'
    await bench.publish_foreign(jobs, nameless, {"content-type": "application/cloudevents+json"})
    await bench.publish_foreign(jobs, b"old", {"specversion": "0.3", "id": "1", "type": "numbered", "source": "urn:o"})
    await app.publish(jobs.message(1))
    await bench.until(lambda: reader.seen, "the next one was not handled")

    async def letters() -> dict[bytes, str]:
        rows = await app.store.dead_letters()
        return {row.raw: f"{row.code} {row.reason}" for row in rows} if len(rows) == 3 else {}

    found = await bench.until(letters, "there are no three dead letters")
    reasons = {
        b"\xff\x00 no event": "E406 not a CloudEvents JSON",
        nameless: "E403 CloudEvents attribute 'id'",
        b"old": "E401",
    }
    for raw, reason in reasons.items():
        must(found.get(raw, "").startswith(reason), f"of {raw!r} it says {found.get(raw)!r}, not {reason}")
    await bench.idle(app)
