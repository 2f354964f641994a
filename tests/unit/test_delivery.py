"""What becomes of one delivery: outcomes, retries, dead letters, the unit of work."""

import asyncio
import threading
import time

import pytest

from tests.unit.rig import until
from trunkline import (
    App,
    Context,
    DiscardError,
    Message,
    Queue,
    RejectError,
    Retry,
    RetryLaterError,
    Service,
    Stream,
    Struct,
    Topic,
)
from trunkline.consumer import Consumer
from trunkline.delivery import MAX_CRASHES

ONCE = Retry(immediate=0, delays_s=())
LATER = Retry(immediate=1, delays_s=(10.0, 20.0), jitter=0.0)


def make_stream(name="orders"):
    stream = Stream(name, key="key")

    @stream.event(type="order.created")
    class OrderCreated(Struct):
        key: str
        number: int = 0

    @stream.event(type="order.paid")
    class OrderPaid(Struct):
        key: str
        number: int = 0

    return stream, OrderCreated, OrderPaid


CHANNELS = {
    "queue": lambda: _single(Queue("jobs", key="key"), "command"),
    "topic": lambda: _single(Topic("news", key="key"), "event"),
    "stream": lambda: _single(Stream("log", key="key"), "event"),
}


def _single(channel, kind):
    class Job(Struct):
        key: str
        number: int = 0

    return getattr(channel, kind)(Job)


@pytest.fixture(params=sorted(CHANNELS))
def job(request):
    return CHANNELS[request.param]()


# --- effectively once ---


@pytest.mark.parametrize("in_transaction", [True, False])
async def test_a_message_published_twice_has_its_effect_once(rig, job, in_transaction):
    service, effects = Service("worker"), []
    service.schema("CREATE TABLE IF NOT EXISTS effect (number INTEGER)")

    @service.handle
    async def work(message: job, ctx: Context) -> None:
        if in_transaction:
            tx = await ctx.transaction()
            await tx.execute("INSERT INTO effect VALUES (?)", (message.number,))
        effects.append(message.number)

    async with rig.run(service) as app:
        await app.publish(job("a", 1), id="one")
        await rig.idle()
        await app.publish(job("a", 1), id="one")
        await app.publish(job("a", 2), id="two")
        await rig.idle()
        assert effects == [1, 2]
        if in_transaction:
            assert rig.query("SELECT number FROM effect") == [(1,), (2,)]


@pytest.mark.parametrize("in_transaction", [True, False])
@pytest.mark.parametrize("suspends", [True, False])
async def test_duplicates_under_way_at_the_same_time_commit_once(rig, job, in_transaction, suspends):
    service, news = Service("worker"), Topic("results")
    service.schema("CREATE TABLE IF NOT EXISTS effect (number INTEGER)")
    results = []

    @news.event
    class Done(Struct):
        number: int

    @service.handle
    async def work(message: job, ctx: Context) -> Done:
        if suspends:
            await asyncio.sleep(0)
        if in_transaction:
            tx = await ctx.transaction()
            await tx.execute("INSERT INTO effect VALUES (?)", (message.number,))
        return Done(message.number)

    @service.handle
    async def note(done: Done) -> None:
        results.append(done.number)

    async with rig.run(service) as app:
        await asyncio.gather(*(app.publish(job(f"key {n}", 1), id="one") for n in range(20)))
        await rig.idle()
        assert results == [1]
        if in_transaction:
            assert rig.query("SELECT number FROM effect") == [(1,)]


async def test_two_tenants_may_use_the_same_id(rig, job):
    service, effects = Service("worker"), []

    @service.handle
    async def work(message: job) -> None:
        effects.append(message.number)

    async with rig.run(service) as app:
        await app.publish(job("a", 1), id="one", tenantid="blue")
        await app.publish(job("a", 2), id="one", tenantid="red")
        await app.publish(job("a", 3), id="one")
        await rig.idle()
        assert effects == [1, 2, 3]


async def test_a_tenants_message_beside_anothers_duplicate_is_not_taken_for_it(rig, job):
    service, effects = Service("worker"), []

    @service.handle
    async def work(message: job) -> None:
        effects.append(message.number)

    def envelope(tenant, number):
        return Message(
            "one", "job", "elsewhere", b'{"key":"a","number":%d}' % number, 0.0, partitionkey="a", tenantid=tenant
        )

    async with rig.run(service):
        await rig.put("worker", envelope("blue", 1))
        await rig.idle()
        await rig.put("worker", envelope("blue", 1), envelope("red", 2))
        await rig.idle()
        assert effects == [1, 2]


async def test_an_id_that_is_no_uuid_counts_with_its_source(rig, job):
    service, effects = Service("worker"), []

    @service.handle
    async def work(message: job) -> None:
        effects.append(message.number)

    def envelope(source, number, message_id):
        return Message(message_id, "job", source, b'{"key":"a","number":%d}' % number, 0.0, partitionkey="a")

    long = "order-number-0000000000000000-000001"
    assert len(long) == 36
    async with rig.run(service):
        await rig.put("worker", envelope("shop", 1, "1"), envelope("store", 2, "1"), envelope("shop", 1, "1"))
        await rig.put("worker", envelope("shop", 3, long), envelope("store", 4, long))
        await rig.idle()
        assert effects == [1, 2, 3, 4]


# --- one commit ---


async def test_writes_messages_and_inbox_commit_together(rig, job):
    service, heard = Service("worker"), []
    news = Topic("results")
    service.schema("CREATE TABLE IF NOT EXISTS effect (number INTEGER)")

    @news.event
    class Done(Struct):
        number: int

    @service.handle
    async def work(message: job, ctx: Context) -> Done:
        tx = await ctx.transaction()
        await tx.execute("INSERT INTO effect VALUES (?)", (message.number,))
        assert await tx.fetch("SELECT number FROM effect") == [(message.number,)]
        return Done(message.number)

    @service.handle
    async def note(done: Done, ctx: Context) -> None:
        heard.append((done.number, rig.query("SELECT number FROM effect"), ctx.message))

    async with rig.run(service) as app:
        first = await app.publish(job("a", 7))
        await rig.idle()
        ((number, rows, envelope),) = heard
        assert (number, rows) == (7, [(7,)])
        assert (envelope.source, envelope.causationid, envelope.correlationid) == ("worker", first, first)


async def test_a_failing_handler_leaves_no_write_no_message_and_no_inbox_row(rig, job):
    service, heard, tries = Service("worker"), [], []
    news = Topic("results")
    service.schema("CREATE TABLE IF NOT EXISTS effect (number INTEGER)")

    @news.event
    class Done(Struct):
        number: int

    @service.handle(retry=Retry(immediate=1, delays_s=()), publishes=[Done])
    async def work(message: job, ctx: Context) -> None:
        tx = await ctx.transaction()
        await tx.execute("INSERT INTO effect VALUES (?)", (message.number,))
        ctx.publish(Done(len(tries)))
        tries.append(ctx.attempt)
        if len(tries) == 1:
            raise OSError("away")

    @service.handle
    async def note(done: Done) -> None:
        heard.append(done.number)

    async with rig.run(service) as app:
        await app.publish(job("a", 7))
        await rig.idle()
        assert tries == [0, 1]
        assert heard == [1]
        assert rig.query("SELECT number FROM effect") == [(7,)]


async def test_a_constraint_that_breaks_at_the_end_of_the_unit_is_a_failure_of_the_handler(rig, job):
    service, heard = Service("worker"), []
    news = Topic("results")
    service.schema(
        "CREATE TABLE IF NOT EXISTS parent (id INTEGER PRIMARY KEY)",
        "CREATE TABLE IF NOT EXISTS child (parent INTEGER REFERENCES parent(id) DEFERRABLE INITIALLY DEFERRED)",
    )

    @news.event
    class Done(Struct):
        number: int

    @service.handle(retry=ONCE)
    async def work(message: job, ctx: Context) -> Done:
        tx = await ctx.transaction()
        if message.number == 1:
            await tx.execute("INSERT INTO child VALUES (99)")
        return Done(message.number)

    @service.handle
    async def note(done: Done) -> None:
        heard.append(done.number)

    async with rig.run(service) as app:
        await app.publish(job("a", 1))
        await app.publish(job("b", 2))
        (letter,) = await rig.buried()
        await rig.idle()
        assert "foreign key" in letter.reason.lower()
        assert heard == [2]
        assert rig.query("SELECT * FROM child") == []


# --- failures ---


async def test_retries_come_at_once_then_after_each_wait_then_the_message_is_set_aside(rig, job, clock):
    service, tries = Service("worker"), []

    @service.handle(retry=LATER)
    async def work(message: job, ctx: Context) -> None:
        tries.append((clock.now() - start, ctx.attempt))
        raise OSError("away")

    async with rig.run(service) as app:
        start = clock.now()
        message_id = await app.publish(job("a", 1))
        await until(lambda: rig.parked() == 1)
        assert tries == [(0.0, 0), (0.0, 1)]
        await clock.advance(9.9)
        assert len(tries) == 2
        await clock.advance(0.1)
        await until(lambda: len(tries) == 3 and rig.parked() == 1 and not rig.app._consumers[0]._under_way)
        await clock.advance(20)
        (letter,) = await rig.buried()
        assert tries[2:] == [(10.0, 2), (30.0, 3)]
        assert (letter.attempt, letter.code, letter.message_id) == (4, "handler", message_id)
        assert letter.reason == "OSError: away"
        assert "raise OSError" in letter.detail
        assert rig.kinds() == ["retried", "parked", "parked", "buried"]
        assert rig.parked() == 0


async def test_a_message_that_succeeds_on_a_delayed_try_is_done(rig, job, clock):
    service, tries = Service("worker"), []

    @service.handle(retry=Retry(immediate=0, delays_s=(10.0,), jitter=0.0))
    async def work(message: job, ctx: Context) -> None:
        tries.append(ctx.attempt)
        if len(tries) == 1:
            raise OSError("away")

    async with rig.run(service) as app:
        await app.publish(job("a", 1))
        await until(lambda: rig.parked() == 1)
        await clock.advance(10)
        await until(lambda: rig.parked() == 0)
        await rig.idle()
        assert tries == [0, 1]
        assert await rig.dead() == []


async def test_a_rejected_message_is_set_aside_without_another_try(rig, job):
    service, tries = Service("worker"), []

    @service.handle
    async def work(message: job) -> None:
        tries.append(message)
        raise RejectError("the card is stolen")

    async with rig.run(service) as app:
        await app.publish(job("a", 1))
        (letter,) = await rig.buried()
        assert (letter.code, letter.reason, letter.attempt) == ("rejected", "the card is stolen", 1)
        assert len(tries) == 1


async def test_a_handler_may_ask_for_another_time(rig, job, clock):
    service, tries = Service("worker"), []

    @service.handle(retry=ONCE)
    async def work(message: job) -> None:
        tries.append(clock.now() - start)
        if len(tries) < 3:
            raise RetryLaterError(60.0, "the bank is closed")

    async with rig.run(service) as app:
        start = clock.now()
        await app.publish(job("a", 1))
        for _ in range(2):
            await until(lambda: rig.parked() == 1 and not rig.app._consumers[0]._under_way)
            await clock.advance(60)
            await until(lambda: rig.app._consumers[0]._under_way == 0)
        await until(lambda: rig.parked() == 0)
        assert tries == [0.0, 60.0, 120.0]
        assert [fact.reason for fact in rig.facts][:1] == ["RetryLaterError: the bank is closed; again in 60.0 s"]


async def test_a_discarded_message_is_gone_and_said_so(rig, job):
    service, tries = Service("worker"), []

    @service.handle
    async def work(message: job) -> None:
        tries.append(message.number)
        raise DiscardError("too late")

    async with rig.run(service) as app:
        await app.publish(job("a", 1))
        await rig.idle()
        assert (tries, await rig.dead()) == ([1], [])
        (fact,) = rig.facts
        assert (fact.kind, fact.reason, fact.channel) == (
            "discarded",
            "too late",
            rig.subscription("worker").channel.name,
        )


async def test_errors_listed_as_hopeless_are_not_tried_again(rig, job):
    service, tries = Service("worker"), []

    @service.handle(retry=Retry(never=(KeyError,)))
    async def work(message: job) -> None:
        tries.append(message)
        raise KeyError("sku")

    async with rig.run(service) as app:
        await app.publish(job("a", 1))
        (letter,) = await rig.buried()
        assert (letter.reason, len(tries)) == ("KeyError: 'sku'", 1)


async def test_a_handler_over_its_time_is_stopped_and_tried_again(rig, job, clock):
    service, tries, stopped = Service("worker"), [], []

    @service.handle(timeout_s=5.0, retry=Retry(immediate=1, delays_s=()))
    async def work(message: job) -> None:
        tries.append(message.number)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.append(message.number)
            raise

    async with rig.run(service) as app:
        await app.publish(job("a", 1))
        await until(lambda: len(tries) == 1)
        await clock.advance(5)
        await until(lambda: len(tries) == 2)
        await clock.advance(5)
        (letter,) = await rig.buried()
        assert letter.reason == "TimeoutError: no end after 5.0 s"
        assert stopped == [1, 1]


async def test_a_handler_that_is_cancelled_from_within_is_a_failure_like_any_other(rig, job):
    service, tries = Service("worker"), []

    @service.handle(retry=Retry(immediate=1, delays_s=()))
    async def work(message: job) -> None:
        tries.append(message.number)
        inner = asyncio.ensure_future(asyncio.Event().wait())
        asyncio.get_running_loop().call_soon(inner.cancel)
        await inner

    async with rig.run(service) as app:
        await app.publish(job("a", 1))
        (letter,) = await rig.buried()
        assert letter.reason == "RuntimeError: the handler was cancelled"
        assert tries == [1, 1]


async def test_a_handler_that_raises_cancelled_at_once_is_a_failure_like_any_other(rig, job):
    service, tries = Service("worker"), []

    @service.handle(retry=Retry(immediate=1, delays_s=()))
    async def work(message: job) -> None:
        tries.append(message.number)
        if message.number == 1:
            raise asyncio.CancelledError

    async with rig.run(service) as app:
        await app.publish(job("a", 1))
        await app.publish(job("b", 2))
        (letter,) = await rig.buried()
        await rig.idle()
        assert letter.reason == "RuntimeError: the handler was cancelled"
        assert sorted(tries) == [1, 1, 2]


async def test_a_publication_that_the_handler_does_not_declare_is_refused(rig, job):
    service = Service("worker")
    news = Topic("results")

    @news.event
    class Done(Struct):
        number: int

    @service.handle
    async def work(message: job, ctx: Context) -> None:
        ctx.publish(Done(1))

    async with rig.run(service) as app:
        await app.publish(job("a", 1))
        (letter,) = await rig.buried()
        assert letter.attempt == 1
        assert "E304" in letter.reason
        assert "publishes Done" in letter.reason
        assert "handle(publishes=(Done,))" in letter.reason


async def test_a_returned_message_that_the_annotation_does_not_say_is_refused(rig, job):
    service = Service("worker")
    news = Topic("results")

    @news.event
    class Done(Struct):
        number: int

    @service.handle
    async def work(message: job) -> None:
        return Done(1)

    async with rig.run(service) as app:
        await app.publish(job("a", 1))
        (letter,) = await rig.buried()
        assert "E304" in letter.reason
        assert "returned Done" in letter.reason
        assert "annotation" in letter.reason


async def test_a_handler_that_returns_nothing_of_what_its_annotation_says_has_failed(rig, job):
    service = Service("worker")
    service.schema("CREATE TABLE IF NOT EXISTS effect (number INTEGER)")
    news = Topic("results")

    @news.event
    class Done(Struct):
        number: int

    @service.handle
    async def work(message: job, ctx: Context) -> Done:
        transaction = await ctx.transaction()
        await transaction.execute("INSERT INTO effect VALUES (?)", (message.number,))

    async with rig.run(service) as app:
        await app.publish(job("a", 1))
        (letter,) = await rig.buried()
        assert "E304" in letter.reason
        assert "work returned nothing, and its annotation says Done" in letter.reason
        assert letter.attempt == 1
        assert rig.query("SELECT * FROM effect") == []


async def test_a_handler_whose_annotation_says_none_too_may_return_nothing(rig, job):
    service, seen = Service("worker"), []
    news = Topic("results")

    @news.event
    class Done(Struct):
        number: int

    @service.handle
    async def work(message: job) -> Done | None:
        seen.append(message.number)

    async with rig.run(service) as app:
        await app.publish(job("a", 1))
        await rig.idle()
        assert seen == [1]
        assert await app.store.dead_letters() == []


# --- threads ---


async def test_a_plain_function_runs_in_a_thread_and_its_writes_join_the_commit(rig, job):
    service, heard = Service("worker"), []
    news = Topic("results")
    service.schema("CREATE TABLE IF NOT EXISTS effect (number INTEGER)")

    @news.event
    class Done(Struct):
        thread: int

    @service.handle
    def work(message: job, ctx: Context) -> Done:
        connection = ctx.connection()
        connection.execute("INSERT INTO effect VALUES (?)", (message.number,))
        connection.commit()
        return Done(threading.get_ident())

    @service.handle
    async def note(done: Done) -> None:
        heard.append((done.thread, rig.query("SELECT number FROM effect")))

    async with rig.run(service) as app:
        await app.publish(job("a", 7))
        await rig.idle()
        ((thread, rows),) = heard
        assert thread != threading.get_ident()
        assert rows == [(7,)]


async def test_a_plain_function_that_fails_writes_nothing(rig, job):
    service = Service("worker")
    service.schema("CREATE TABLE IF NOT EXISTS effect (number INTEGER)")

    @service.handle(retry=ONCE)
    def work(message: job, ctx: Context) -> None:
        ctx.connection().execute("INSERT INTO effect VALUES (?)", (message.number,))
        raise OSError("away")

    async with rig.run(service) as app:
        await app.publish(job("a", 7))
        await rig.buried()
        assert rig.query("SELECT number FROM effect") == []


async def test_a_connection_cannot_be_asked_for_on_the_loop(rig, job):
    service = Service("worker")

    @service.handle(retry=ONCE)
    async def work(message: job, ctx: Context) -> None:
        ctx.connection()

    async with rig.run(service) as app:
        await app.publish(job("a", 7))
        (letter,) = await rig.buried()
        assert "await ctx.transaction()" in letter.reason


@pytest.mark.parametrize("raised", [SystemExit(3), BaseExceptionGroup("both", [SystemExit(2)])], ids=["exit", "group"])
@pytest.mark.parametrize("way", ["at once", "later", "in a thread"])
async def test_a_handler_that_wants_the_process_to_end_has_failed(rig, job, raised, way):
    service = Service("worker")

    async def at_once(_message: job) -> None:
        raise raised

    async def later(_message: job) -> None:
        await asyncio.sleep(0)
        raise raised

    def in_a_thread(_message: job) -> None:
        raise raised

    service.handle(retry=ONCE)({"at once": at_once, "later": later, "in a thread": in_a_thread}[way])
    async with rig.run(service) as app:
        await app.publish(job("a", 7))
        (letter,) = await rig.buried()
        assert f"the handler raised {type(raised).__name__}" in letter.reason


async def test_as_many_plain_functions_run_at_once_as_concurrency_says(rig, job):
    service, together = Service("worker"), threading.Barrier(64)

    @service.handle(retry=ONCE)
    def work(_message: job) -> None:
        together.wait(10)

    async with rig.run(service) as app:
        await app.publish_all([job(str(number)) for number in range(64)])
        await rig.idle(20)
        assert await rig.dead() == []


async def test_a_plain_function_that_raises_stop_iteration_has_failed(rig, job):
    service = Service("worker")

    @service.handle(retry=ONCE, timeout_s=None)
    def work(_message: job) -> None:
        next(iter(()))

    async with rig.run(service) as app:
        await app.publish(job("a", 7))
        (letter,) = await rig.buried()
        assert "StopIteration" in letter.reason


async def test_a_thread_that_outlives_its_time_writes_nothing_any_more(rig, job, clock):
    service, outcome = Service("worker"), []
    service.schema("CREATE TABLE IF NOT EXISTS effect (number INTEGER)")
    go_on, begun = threading.Event(), threading.Event()

    @service.handle(retry=ONCE, timeout_s=5.0)
    def work(message: job, ctx: Context) -> None:
        connection = ctx.connection()
        connection.execute("INSERT INTO effect VALUES (1)")
        begun.set()
        assert go_on.wait(3)
        try:
            connection.execute("INSERT INTO effect VALUES (2)")
        except Exception as error:  # noqa: BLE001 - the test looks at it
            outcome.append(error)
        else:
            outcome.append(None)

    async with rig.run(service) as app:
        await app.publish(job("a", 7))
        await until(begun.is_set)
        await clock.advance(5)
        await rig.buried()
        go_on.set()
        await until(lambda: outcome)
        assert "ended" in str(outcome[0])
        assert rig.query("SELECT number FROM effect") == []


async def test_a_thread_that_outlives_its_time_cannot_open_a_transaction(rig, job, clock):
    service, outcome = Service("worker"), []
    go_on, begun = threading.Event(), threading.Event()

    @service.handle(retry=ONCE, timeout_s=5.0)
    def work(message: job, ctx: Context) -> None:
        if message.number == 2:
            return
        begun.set()
        assert go_on.wait(3)
        try:
            ctx.connection()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            outcome.append(error)
        else:
            outcome.append(None)

    async with rig.run(service) as app:
        await app.publish(job("a", 1))
        await until(begun.is_set)
        await clock.advance(5)
        await rig.buried()
        go_on.set()
        await until(lambda: outcome)
        assert "ended" in str(outcome[0])
        # Nobody holds the store: others go on.
        await app.publish(job("b", 2))
        await rig.idle()


async def test_a_context_kept_beyond_its_handler_is_refused_not_ignored(rig, job):
    service, kept = Service("worker"), []

    @service.handle(publishes=[job])
    async def work(message: job, ctx: Context) -> None:
        kept.append(ctx)

    async with rig.run(service) as app:
        await app.publish(job("a", 1))
        await rig.idle()
        with pytest.raises(Exception, match="ended"):
            kept[0].publish(job("a", 2))
        with pytest.raises(Exception, match="ended"):
            await kept[0].transaction()


async def test_a_handler_cannot_end_the_unit_of_work_itself(rig, job):
    service = Service("worker")
    service.schema("CREATE TABLE IF NOT EXISTS effect (number INTEGER)")

    @service.handle(retry=ONCE)
    async def work(message: job, ctx: Context) -> None:
        tx = await ctx.transaction()
        await tx.execute("INSERT INTO effect VALUES (?)", (message.number,))
        if message.number == 1:
            await tx.execute("COMMIT")
        if message.number == 2:
            tx.connection().execute("ROLLBACK")
        if message.number == 3:
            raise OSError("away")

    async with rig.run(service) as app:
        for number in (1, 2, 3, 4):
            await app.publish(job("abcd"[number - 1], number))
        letters = await rig.buried(3)
        await rig.idle()
        assert "unit of work" in letters[0].reason
        assert "unit of work" in letters[1].reason
        assert rig.query("SELECT number FROM effect") == [(4,)]


# --- what is not run ---


async def test_an_expired_message_is_dropped_and_said_so(rig, job, clock):
    service, effects = Service("worker"), []

    @service.handle
    async def work(message: job) -> None:
        effects.append(message.number)

    async with rig.run(service) as app:
        await app.publish(job("a", 1), expirytime=clock.now() - 1)
        await app.publish(job("a", 2), expirytime=clock.now() + 1)
        await rig.idle()
        assert effects == [2]
        assert [(fact.kind, fact.reason) for fact in rig.facts] == [("discarded", "expired")]


async def test_an_unknown_type_on_a_queue_is_a_dead_letter(rig):
    queue, service, effects = Queue("jobs"), Service("worker"), []

    @queue.command
    class Known(Struct):
        number: int

    @queue.command
    class Unknown(Struct):
        number: int

    @service.handle
    async def work(message: Known) -> None:
        effects.append(message.number)

    async with rig.run(service) as app:
        await app.publish(Unknown(1))
        await app.publish(Known(2))
        (letter,) = await rig.buried()
        await rig.idle()
        assert (letter.code, letter.message_type, effects) == ("E415", "unknown", [2])
        assert "'unknown'" in letter.reason
        assert "have: known" in letter.reason


@pytest.mark.parametrize("channel", [Topic("news-of-all"), Stream("log-of-all")], ids=["topic", "stream"])
async def test_a_type_that_nobody_here_handles_is_passed_over_on_topics_and_streams(rig, channel):
    service, effects = Service("worker"), []
    channel.types.clear()

    @channel.event
    class Known(Struct):
        number: int

    @channel.event
    class Unknown(Struct):
        number: int

    @service.handle
    async def work(message: Known) -> None:
        effects.append(message.number)

    async with rig.run(service) as app:
        await app.publish_all([Unknown(1), Known(2), Unknown(3)])
        await rig.idle()
        assert (effects, await rig.dead(), rig.facts) == ([2], [], [])


async def test_an_unreadable_envelope_is_a_dead_letter_with_its_bytes(rig, job):
    service, effects = Service("worker"), []

    @service.handle
    async def work(message: job) -> None:
        effects.append(message.number)

    async with rig.run(service) as app:
        await rig.put_bytes("worker", b"\xff\x00 not an envelope")
        await app.publish(job("a", 1))
        (letter,) = await rig.buried()
        await rig.idle()
        assert (letter.code, letter.raw, letter.message_id) == ("E400", b"\xff\x00 not an envelope", "")
        assert effects == [1]


async def test_a_payload_that_does_not_fit_its_type_is_a_dead_letter_at_the_first_try(rig, job):
    service, effects = Service("worker"), []

    @service.handle
    async def work(message: job) -> None:
        effects.append(message.number)

    async with rig.run(service):
        await rig.put("worker", Message("x", "job", "elsewhere", b'{"key": 5}', 0.0))
        (letter,) = await rig.buried()
        assert (letter.code, letter.message_id, effects) == ("E412", "x", [])
        assert rig.kinds() == ["buried"]


async def test_an_observer_that_fails_disturbs_nothing(rig, job, caplog):
    service = Service("worker")

    @service.handle
    async def work(message: job) -> None:
        raise DiscardError("enough")

    def broken(fact):
        raise LookupError("observer")

    async with rig.run(service) as app:
        app.hooks.add(broken)
        await app.publish(job("a", 1))
        await rig.idle()
        assert rig.kinds() == ["discarded"]
        assert "observer" in caplog.text


async def test_a_failure_is_logged_with_message_handler_attempt_and_outcome(rig, job, caplog):
    service = Service("worker")

    @service.handle(retry=ONCE)
    async def work(message: job) -> None:
        raise OSError("away")

    async with rig.run(service) as app:
        message_id = await app.publish(job("a", 1))
        await rig.buried()
        assert f"work failed on job {message_id}, attempt 1: set aside" in caplog.text
        assert f"set aside job {message_id} on worker@" in caplog.text


async def test_a_message_handled_before_a_restart_is_not_handled_again(file_rig, job):
    effects = []

    def service():
        made = Service("worker")

        @made.handle
        async def work(message: job) -> None:
            effects.append(message.number)

        return made

    async with file_rig.run(service()) as app:
        await app.publish(job("a", 1), id="one")
        await file_rig.idle()
    async with file_rig.run(service()) as app:
        await app.publish(job("a", 1), id="one")
        await app.publish(job("a", 2), id="two")
        await file_rig.idle()
    assert effects == [1, 2]


async def test_a_try_that_a_stop_interrupts_is_no_crash(file_rig, job, monkeypatch):
    service, begun, handled, free = Service("worker"), [], [], asyncio.Event()
    admit = Consumer._admit

    async def admit_suspects(self, batch):
        for delivery in batch:
            delivery.suspect, delivery.fresh = True, False
        await admit(self, batch)

    @service.handle
    async def work(message: job) -> None:
        begun.append(message.number)
        await free.wait()
        handled.append(message.number)

    monkeypatch.setattr(Consumer, "_admit", admit_suspects)
    for stops in range(1, MAX_CRASHES + 3):
        async with file_rig.run(service, grace_s=0.01) as app:
            if stops == 1:
                await app.publish(job("a", 7))
            await until(lambda: len(begun) == stops)  # noqa: B023 - awaited in this turn
    async with file_rig.run(service):
        free.set()
        await until(lambda: handled)
        assert (begun, handled, await file_rig.dead()) == ([7] * (MAX_CRASHES + 3), [7], [])


async def test_what_the_cancellation_of_a_stop_comes_out_as_is_no_failure(file_rig, job):
    service, begun, handled, free = Service("worker"), [], [], asyncio.Event()

    @service.handle(retry=ONCE)
    async def work(message: job) -> None:
        begun.append(message.number)
        try:
            await free.wait()
        except asyncio.CancelledError:
            raise ValueError("the bank did not answer") from None
        handled.append(message.number)

    async with file_rig.run(service, grace_s=0.01) as app:
        await app.publish(job("a", 7))
        await until(lambda: begun)
    assert begun == [7]
    free.set()
    async with file_rig.run(service):
        await until(lambda: handled)
        assert await file_rig.dead() == []


async def test_a_stop_goes_on_where_the_store_refuses_to_take_tries_back(file_rig, job, monkeypatch, caplog):
    service, begun = Service("worker"), []

    @service.handle
    async def work(message: job) -> None:
        begun.append(message.number)
        await asyncio.Event().wait()

    async def refuse(_deliveries):
        raise ValueError("the table is gone")

    async with file_rig.run(service, grace_s=0.01) as app:
        await app.publish(job("a", 7))
        await until(lambda: begun)
        (consumer,) = app._consumers
        consumer._begun[0] = None
        monkeypatch.setattr(app.store, "undo_attempts", refuse)
    assert (
        "did not take back 1 tries that the stop interrupted; they count as crashes: the table is gone" in caplog.text
    )
    async with file_rig.run(service, grace_s=0.01):
        await until(lambda: begun == [7, 7])


async def test_a_held_transaction_is_reported_by_name(file_rig, job, clock, caplog):
    service = Service("worker")

    @service.handle
    async def work(message: job, ctx: Context) -> None:
        await ctx.transaction()
        await clock.advance(1)

    async with file_rig.run(service) as app:
        await app.publish(job("a", 1))
        await file_rig.idle()
    assert "work held the transaction for 1.00 s" in caplog.text


async def test_a_transaction_is_reported_while_it_is_held(file_rig, job, clock, caplog):
    service, told = Service("worker"), "work has held the transaction for 5 s and still does"

    @service.handle
    async def work(_message: job, ctx: Context) -> None:
        await ctx.transaction()
        await clock.advance(6)
        await until(lambda: told in caplog.text)

    async with file_rig.run(service) as app:
        await app.publish(job("a", 1))
        await file_rig.idle()
    assert told in caplog.text


async def test_a_transaction_that_its_handler_has_not_begun_yet_is_not_reported(file_rig):
    async with file_rig.run(Service("worker")) as app:
        engine = app.store.engine
        asking = asyncio.ensure_future(engine.acquire("work"))
        while engine._phase != "held":
            await asyncio.sleep(0)
        try:
            assert engine._holder is None
            engine._tell_held()
        finally:
            asking.cancel()


def test_a_handler_is_an_ordinary_function(job):
    service = Service("worker")

    @service.handle
    async def work(message: job) -> job:
        return job(message.key, message.number + 1)

    assert asyncio.run(work(job("a", 1))) == job("a", 2)
    assert time.time() > 0
    assert App(service, "memory:").system.name == "worker"
