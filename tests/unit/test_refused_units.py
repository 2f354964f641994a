"""What cannot be stored fails alone: its neighbours are committed, and the subscription goes on."""

import asyncio
import gc
import logging
import os
import weakref

import apsw
import msgspec
import pytest

from tests.unit.rig import until
from trunkline import App, Context, Message, Queue, RejectError, Retry, RetryLaterError, Service, Stream, Struct
from trunkline.errors import PublishError, TransactionError, UnroutableError
from trunkline.store import Unit
from trunkline.transport import Staged

ONCE = Retry(immediate=0, delays_s=())
facts = Stream("refused-facts", key="key")
orders = Queue("refused-orders", priority=True)


@facts.event
class Fact(Struct):
    key: str
    number: int = 0


@orders.command
class Order(Struct):
    key: str


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


UNUSUAL = {
    "text that is no UTF-8": lambda: ValueError("cannot open " + os.fsdecode(b"caf\xe9.txt")),
    "a reason that is an exception": lambda: RejectError(ValueError("no")),
    "a reason that is None": lambda: RejectError(None),
    "a text that raises": lambda: UnprintableError(),  # noqa: PLW0108 - as the others
}


@pytest.mark.parametrize("which", UNUSUAL)
async def test_whatever_an_error_says_its_message_is_set_aside_and_others_go_on(rig, which, caplog):
    caplog.set_level(logging.CRITICAL, "trunkline")  # pytest cannot pass on a log that is no UTF-8
    service, seen = Service("checker"), []

    @service.handle(retry=ONCE)
    async def check(fact: Fact) -> None:
        if fact.key == "bad":
            error = UNUSUAL[which]()
            raise error
        seen.append(fact.key)

    async with rig.run(service) as app:
        await app.publish_all([Fact("good"), Fact("bad"), Fact("fine")])
        (row,) = await rig.buried()
        assert row.key == "bad"
        assert row.reason.encode()
        await until(lambda: sorted(seen) == ["fine", "good"])


@pytest.mark.parametrize("after_s", [float("nan"), float("inf"), -1, "5", None])
def test_a_wait_that_is_no_number_of_seconds_is_refused_where_it_is_said(after_s):
    with pytest.raises(ValueError, match="a number of seconds"):
        RetryLaterError(after_s)


WRONG = [
    {"key": 5}, {"key": "\ud800"}, {"id": 5}, {"id": None}, {"id": ""}, {"id": "\ud800"}, {"subject": b"bytes"},
    {"expirytime": "tomorrow"}, {"expirytime": float("nan")}, {"expirytime": float("inf")}, {"expirytime": 1e300},
    {"extensions": {"id": "another"}}, {"extensions": {"expirytime": "never"}}, {"extensions": {"data": "x"}},
    {"priority": "high"}, {"extensions": {"a": 1}}, {"tenantid": 7},
]  # fmt: skip


@pytest.mark.parametrize("attributes", WRONG, ids=repr)
async def test_an_attribute_of_the_wrong_kind_is_refused_at_once_and_disturbs_no_neighbour(rig, attributes):
    async with rig.run(Service("anyone")) as app:
        neighbour = asyncio.create_task(app.publish(Fact("neighbour")))
        with pytest.raises(PublishError) as refused:
            await app.publish(Fact("a"), **attributes)
        assert refused.value.code == "E307"
        await neighbour


async def test_a_ready_made_message_is_looked_at_too(rig):
    async with rig.run(Service("anyone")) as app:
        with pytest.raises(PublishError, match="attribute time"):
            await app.publish(Message("id", "type", "source", b"{}", "now"), to=facts)
        with pytest.raises(UnroutableError, match="is no channel"):
            await app.publish(Fact("a"), to="refused-facts")


async def test_a_unit_that_cannot_be_written_fails_alone(file_rig):
    """The net below all checks: a row that the file does not take."""
    service, seen, ends = Service("reader"), [], {}

    @service.handle
    async def read(fact: Fact) -> None:
        seen.append(fact.key)

    async with file_rig.run(service) as app:
        await app.publish(Fact("first"))
        await until(lambda: seen)
        good, beside = staged(app, Fact("good")), staged(app, Fact("beside the bad one"))
        bad = Staged(facts, msgspec.structs.replace(good.message, partitionkey=5))
        for name, batch in (("good", (good,)), ("bad", (beside, bad))):
            unit = Unit((), lambda _unit, error, name=name: ends.__setitem__(name, error))
            unit.staged = batch
            app.store.submit(unit)
        await until(lambda: len(ends) == 2)
        assert ends["good"] is None
        assert isinstance(ends["bad"], AttributeError)
        await app.publish(Fact("later"))
        await until(lambda: "later" in seen)
        assert seen == ["first", "good", "later"]
        assert file_rig.query("SELECT count(*) FROM trunkline_log") == [(3,)]


async def test_what_a_caller_held_whose_unit_was_refused_is_not_kept_in_memory(file_rig):
    held = []

    async def publish(app: App) -> None:
        marker = Service("marker")
        held.append(weakref.ref(marker))
        await app.commit([Staged(facts, Message("bad", "type", "source", b"", 0.0, partitionkey=5))])

    async with file_rig.run(Service("publisher")) as app:
        with pytest.raises(AttributeError):
            await publish(app)
        await app.publish(Fact("later"))
        gc.collect()
        assert held[0]() is None


async def test_a_unit_with_a_transaction_that_cannot_be_written_fails_alone(file_rig):
    service, seen = Service("writer"), []
    service.schema("CREATE TABLE IF NOT EXISTS effect (key TEXT)")

    @service.handle(retry=ONCE)
    async def write(fact: Fact, ctx: Context) -> None:
        tx = await ctx.transaction()
        await tx.execute("INSERT INTO effect VALUES (?)", (fact.key,))
        if fact.key == "bad":
            ctx._unit.stage(Staged(facts, Message("bad", "type", "source", b"", 0.0, partitionkey=5)))
        seen.append(fact.key)

    async with file_rig.run(service) as app:
        await app.publish_all([Fact("good"), Fact("bad"), Fact("fine")])
        await file_rig.buried()
        await until(lambda: file_rig.query("SELECT key FROM effect ORDER BY key") == [("fine",), ("good",)])


# --- a handler's transaction ---


FORBIDDEN = [
    "COMMIT", "/* c */ COMMIT", "; COMMIT", "-- c\nROLLBACK", "RELEASE trunkline_unit", "SAVEPOINT trunkline_unit",
    "PRAGMA query_only=1", "PRAGMA wal_checkpoint", "PRAGMA locking_mode=EXCLUSIVE", "ATTACH ':memory:' AS other",
    "DROP TABLE trunkline_inbox", "DELETE FROM trunkline_inbox",
]  # fmt: skip


@pytest.mark.parametrize("statement", FORBIDDEN)
async def test_a_statement_that_ends_the_unit_or_touches_our_tables_is_refused_however_it_is_written(
    file_rig, statement
):
    service = Service("writer")
    service.schema("CREATE TABLE IF NOT EXISTS effect (key TEXT)")

    @service.handle(retry=ONCE)
    async def write(fact: Fact, ctx: Context) -> None:
        tx = await ctx.transaction()
        await tx.execute("INSERT INTO effect VALUES (?)", (fact.key,))
        if fact.key == "bad":
            await tx.execute(statement)

    async with file_rig.run(service) as app:
        await app.publish_all([Fact("bad"), Fact("good")])
        (row,) = await file_rig.buried()
        assert "E510" in row.reason
        await until(lambda: file_rig.query("SELECT key FROM effect") == [("good",)])


async def test_savepoints_and_questions_about_the_schema_are_allowed(file_rig):
    service, seen = Service("writer"), []
    service.schema("CREATE TABLE IF NOT EXISTS effect (key TEXT)")

    @service.handle(retry=ONCE)
    async def write(fact: Fact, ctx: Context) -> None:
        tx = await ctx.transaction()
        await tx.execute("SAVEPOINT unit")
        await tx.execute("INSERT INTO effect VALUES ('undone')")
        await tx.execute("ROLLBACK TO unit")
        seen.append(await tx.fetch("PRAGMA table_info(effect)"))
        await tx.execute("INSERT INTO effect VALUES (?)", (fact.key,))

    async with file_rig.run(service) as app:
        await app.publish(Fact("good"))
        await until(lambda: file_rig.query("SELECT key FROM effect") == [("good",)])
    assert seen[0][0][1] == "key"


@pytest.mark.parametrize("goes_on", [True, False])
async def test_nothing_commits_by_itself_after_a_statement_undid_the_transaction(file_rig, goes_on):
    service, tries = Service("writer"), []
    service.schema("CREATE TABLE IF NOT EXISTS effect (key TEXT)", "CREATE TABLE IF NOT EXISTS once (n UNIQUE)")

    @service.handle(retry=ONCE)
    async def write(fact: Fact, ctx: Context) -> None:
        tx = await ctx.transaction()
        if fact.key == "bad":
            tries.append(fact)
            await tx.execute("INSERT INTO once VALUES (1)")
            try:
                await tx.execute("INSERT OR ROLLBACK INTO once VALUES (1)")
            except apsw.ConstraintError:
                if not goes_on:
                    return
        await tx.execute("INSERT INTO effect VALUES (?)", (fact.key,))

    async with file_rig.run(service) as app:
        await app.publish_all([Fact("bad"), Fact("good")])
        (row,) = await file_rig.buried()
        assert "undid the whole transaction" in row.reason
        # Its neighbour was undone with it and is done again.
        await file_rig.pass_time(lambda: file_rig.query("SELECT key FROM effect") == [("good",)])
        assert file_rig.query("SELECT count(*) FROM once") == [(0,)]
    assert len(tries) == 1


async def test_two_tasks_of_a_handler_may_ask_for_the_transaction_at_once(rig):
    service, seen = Service("writer"), []

    @service.handle(retry=ONCE)
    async def write(fact: Fact, ctx: Context) -> None:
        first, second = await asyncio.gather(ctx.transaction(), ctx.transaction())
        seen.append(first is second)

    async with rig.run(service) as app:
        await app.publish(Fact("a"))
        await until(lambda: seen)
    assert seen == [True]


async def test_publishing_through_the_app_inside_a_transaction_is_refused_instead_of_waiting_for_itself(file_rig):
    service, refused = Service("writer"), []

    @service.handle(retry=ONCE)
    async def write(fact: Fact, ctx: Context) -> None:
        await ctx.transaction()
        try:
            await file_rig.app.publish(Order("a"))
        except TransactionError as error:
            refused.append(error.code)

    async with file_rig.run(service) as app:
        await app.publish(Fact("a"))
        await until(lambda: refused)
    assert refused == ["E512"]


async def test_a_handler_that_wants_the_process_to_end_leaves_no_transaction_open(file_rig):
    service = Service("writer")

    @service.handle(retry=ONCE)
    async def write(fact: Fact, ctx: Context) -> None:
        await ctx.transaction()
        raise SystemExit(3)

    async with file_rig.run(service) as app:
        await app.publish(Fact("a"))
        (letter,) = await file_rig.buried()
        async with asyncio.timeout(10):
            await app.publish(Fact("b"))
    assert "SystemExit: 3" in letter.reason


# --- order of a parked key ---


async def test_successors_that_come_while_parked_messages_run_stay_behind_them(rig):
    service, begun, ended = Service("worker"), [], []

    @service.handle(retry=Retry(immediate=0, delays_s=(1.0,), jitter=0))
    async def work(fact: Fact, ctx: Context) -> None:
        if fact.number == 0 and ctx.attempt == 0:
            raise ConnectionError("away")
        begun.append(fact.number)
        await until(lambda: len(published) > fact.number + 9)
        await ctx.transaction()  # so that its commit comes before that of what is parked behind it
        ended.append(fact.number)

    async with rig.run(service) as app:
        published = list(range(10))
        for number in published[:]:
            await app.publish(Fact("a", number))
        await until(lambda: rig.parked() == 10)
        await rig.pass_time(lambda: begun)
        for number in range(10, 60):
            await app.publish(Fact("a", number))  # while a parked one is in its handler
            published.append(number)
            await until(lambda number=number: len(begun) > min(number - 9, 49))
        await until(lambda: len(ended) >= 50)
    assert begun[:50] == list(range(50))
    assert ended[:50] == list(range(50))


async def test_a_successor_that_runs_while_the_commit_before_it_fails_stays_behind_it(rig):
    service = Service("worker")
    service.schema(
        "CREATE TABLE IF NOT EXISTS effect (place INTEGER, number INTEGER)",
        "CREATE TABLE IF NOT EXISTS parent (id INTEGER PRIMARY KEY)",
        "CREATE TABLE IF NOT EXISTS child (parent INTEGER REFERENCES parent(id) DEFERRABLE INITIALLY DEFERRED)",
    )

    @service.handle(retry=Retry(immediate=0, delays_s=(1.0,), jitter=0))
    async def work(fact: Fact, ctx: Context) -> None:
        tx = await ctx.transaction()
        await tx.execute("INSERT INTO effect VALUES ((SELECT count(*) FROM effect), ?)", (fact.number,))
        if (fact.number, ctx.attempt) == (0, 0):
            await tx.execute("INSERT INTO child VALUES (99)")

    async with rig.run(service) as app:
        await app.publish_all([Fact("a", number) for number in range(3)])
        await until(lambda: rig.parked() == 3)
        await rig.pass_time(lambda: rig.query("SELECT count(*) FROM effect") == [(3,)])
        assert rig.query("SELECT number FROM effect ORDER BY place") == [(0,), (1,), (2,)]


# --- the relay between two files ---


async def test_what_a_relay_had_taken_is_sent_by_the_next_process(tmp_path, clock):
    service = Service("sender")
    urls = f"sqlite:///{tmp_path}/channels.db", f"sqlite:///{tmp_path}/store.db"

    @service.handle(retry=ONCE)
    async def pass_on(fact: Fact) -> Order:
        return Order(fact.key)

    app = App(service, urls[0], store=urls[1], clock=clock, grace_s=0.1)
    await app.start()
    away = asyncio.Event()

    async def never(batch):
        away.set()
        await asyncio.Event().wait()

    send, app.transport.send = app.transport.send, never
    await send((staged(app, Fact("a")),))
    await away.wait()
    await app.stop()
    async with App(service, urls[0], store=urls[1], clock=clock) as app:
        waiting = "SELECT count(*) FROM trunkline_queue"
        await until(lambda: app.transport.engine.reader.execute(waiting).fetchall() == [(1,)])


def staged(app: App, payload: Fact) -> Staged:
    from trunkline.handler import make_message

    return make_message(payload, app.clock, "test", None, None, None, {})
