"""The handler's transaction in PostgreSQL, and publishing within a transaction of the user's."""

import asyncio
import contextlib
import secrets
from urllib.parse import urlsplit

import asyncpg
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tests.docs.test_code_blocks import ROOT, run_blocks
from trunkline import App, Context, Queue, Retry, Service, Stream, Struct
from trunkline.errors import ConfigurationError, PublishError, TransactionError
from trunkline.testing.proxy import Proxy

ONCE = Retry(immediate=0, delays_s=())


@pytest.fixture
def url(database):
    return database


@pytest.fixture
def job():
    jobs = Queue(f"jobs-{secrets.token_hex(4)}")

    @jobs.command
    class Job(Struct):
        number: int

    return Job


async def until(condition, within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


async def rows(url: str, sql: str = "SELECT number FROM effect ORDER BY 1") -> list:
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(sql)]
    finally:
        await connection.close()


def with_effects(name: str = "worker") -> Service:
    service = Service(name)
    service.schema("CREATE TABLE IF NOT EXISTS effect (number integer UNIQUE)")
    return service


async def outcome(url, job, act) -> list:
    """Run `act(tx)` in a handler; return what it raised, or nothing, and the dead letters' reasons."""
    service, raised, over = with_effects(), [], []

    @service.handle(retry=ONCE)
    async def work(message: job, ctx: Context) -> None:
        tx = await ctx.transaction()
        try:
            await act(tx)
        except BaseException as error:
            raised.append(error)
            raise
        finally:
            over.append(message)

    async with App(service, url) as app:
        await app.send(job(1))
        await until(lambda: over)
        await app.send(job(2))  # what comes after goes on
        await until(lambda: len(over) > 1)
        async with asyncio.timeout(20):
            while (await app.transport.backlog(app._consumers[0].subscription)).waiting:
                await asyncio.sleep(0.01)
        return raised, [letter.reason for letter in await app.store.dead_letters()]


@pytest.mark.parametrize(
    "sql",
    [
        "COMMIT", "rollback", "END", "ABORT", "BEGIN", "START TRANSACTION", "/* x */ commit", "-- x\nCOMMIT", ";commit",
        "PREPARE TRANSACTION 'x'", "COMMIT AND CHAIN", "ROLLBACK WORK",
    ],
)  # fmt: skip
async def test_a_statement_that_ends_the_unit_is_refused(url, job, sql):
    raised, letters = await outcome(url, job, lambda tx: tx.execute(sql))
    assert isinstance(raised[0], TransactionError)
    assert raised[0].code == "E510"
    assert len(letters) == 2


@pytest.mark.parametrize("sql", ["INSERT INTO effect VALUES (9); COMMIT", "SELECT 1; ROLLBACK"])
async def test_a_second_statement_behind_a_semicolon_is_refused_by_the_server(url, job, sql):
    raised, _ = await outcome(url, job, lambda tx: tx.execute(sql))
    assert isinstance(raised[0], asyncpg.PostgresSyntaxError)
    assert await rows(url) == []


async def test_savepoints_are_the_handlers_own(url, job):
    async def act(tx):
        await tx.execute("SAVEPOINT mine")
        await tx.execute("INSERT INTO effect VALUES ($1)", (5,))
        await tx.execute("ROLLBACK TO SAVEPOINT mine")
        async with tx.asyncpg.transaction():
            await tx.asyncpg.execute("INSERT INTO effect VALUES (6) ON CONFLICT DO NOTHING")

    raised, letters = await outcome(url, job, act)
    assert not raised
    assert not letters
    assert await rows(url) == [(6,)]


async def test_a_handler_that_ends_the_transaction_behind_our_back_is_a_failure_of_the_handler(url, job):
    raised, letters = await outcome(url, job, lambda tx: tx.asyncpg.execute("COMMIT"))
    assert not raised
    assert ["ended its transaction by itself" in letter for letter in letters] == [True, True]


async def test_a_statement_that_failed_fails_the_unit_though_the_handler_went_on(url, job):
    async def act(tx):
        with contextlib.suppress(asyncpg.UndefinedTableError):
            await tx.execute("INSERT INTO nowhere VALUES (1)")

    raised, letters = await outcome(url, job, act)
    assert not raised
    assert ["nowhere" in letter for letter in letters] == [True, True]


async def test_rows_changed_and_rows_read_are_told_with_either_mark_for_parameters(url, job):
    told = []

    async def act(tx):
        told.append(
            await tx.execute("INSERT INTO effect SELECT generate_series(?::int, ?) ON CONFLICT DO NOTHING", (1, 3))
        )
        told.append(await tx.execute("UPDATE effect SET number = number + 10 WHERE number < $1", (3,)))
        told.append(await tx.fetch("SELECT number, '?' FROM effect WHERE number > ? ORDER BY 1", (2,)))
        told.append(await tx.execute("DELETE FROM effect"))

    await outcome(url, job, act)
    assert told[:4] == [3, 2, [(3, "?"), (11, "?"), (12, "?")], 3]


async def test_a_transaction_has_no_blocking_connection_and_ends_with_its_handler(url, job):
    kept = []

    async def act(tx):
        kept.append(tx)
        with pytest.raises(TransactionError, match="E514"):
            tx.connection()

    await outcome(url, job, act)
    with pytest.raises(TransactionError, match="E509"):
        await kept[0].execute("SELECT 1")
    with pytest.raises(TransactionError, match="E509"):
        _ = kept[0].asyncpg


@pytest.mark.parametrize("stands_in", ["a statement", "its commit"])
async def test_a_stop_does_not_wait_for_a_transaction_whose_connection_carries_nothing(url, job, stands_in, caplog):
    service, begun, gate = with_effects(), asyncio.Event(), asyncio.Event()

    @service.handle
    async def work(message: job, ctx: Context) -> None:
        tx = await ctx.transaction()
        await tx.execute("INSERT INTO effect VALUES (?)", (message.number,))
        begun.set()
        await gate.wait()
        if stands_in == "a statement":
            await tx.execute("SELECT 1")

    place = urlsplit(url)
    async with Proxy(place.hostname, place.port) as proxy:
        app = App(service, f"{proxy.url(url)}?timeout_s=2", grace_s=1)
        await app.start()
        await app.send(job(1))
        await begun.wait()
        proxy.swallow()
        gate.set()
        async with asyncio.timeout(30):
            await app.stop()
    assert "the store refused a commit" not in caplog.text  # what is stopped does nothing again
    async with App(service, f"{url}?lease_s=2"):  # what could not be given back is taken over
        async with asyncio.timeout(20):
            while await rows(url) != [(1,)]:
                await asyncio.sleep(0.05)


async def test_messages_of_one_key_see_what_the_one_before_wrote(url):
    log = Stream(f"log-{secrets.token_hex(4)}", key="key")

    @log.event
    class Entry(Struct):
        key: str
        number: int

    service, seen = Service("counter"), []
    service.schema("CREATE TABLE IF NOT EXISTS total (key text PRIMARY KEY, number int)")

    @service.handle(concurrency=16)
    async def add(entry: Entry, ctx: Context) -> None:
        if entry.number % 3 == 0:
            return  # without a transaction: committed with a group, and still in its place
        tx = await ctx.transaction()
        found = await tx.fetch("SELECT number FROM total WHERE key = $1", (entry.key,))
        await tx.execute(
            "INSERT INTO total VALUES ($1, 1) ON CONFLICT (key) DO UPDATE SET number = total.number + 1", (entry.key,)
        )
        seen.append((entry.key, found[0][0] if found else 0))

    async with App(service, url) as app:
        await app.publish_all([Entry(f"key {n % 8}", n // 8) for n in range(240)])
        await until(lambda: len(seen) >= 160)
    for key in {key for key, _ in seen}:
        assert [count for k, count in seen if k == key] == list(range(20))


# --- SQLAlchemy ---


class Base(DeclarativeBase):
    pass


class Effect(Base):
    __tablename__ = "effect"
    number: Mapped[int] = mapped_column(primary_key=True)


async def test_sqlalchemy_joins_the_handlers_transaction(url, job):
    async def act(tx):
        async with tx.sqlalchemy() as connection, AsyncSession(bind=connection) as session:
            session.add(Effect(number=7))
            await session.flush()
            assert await tx.fetch("SELECT number FROM effect WHERE number = 7") == [(7,)]
            await session.execute(text("DELETE FROM effect WHERE number = 7"))
            session.add(Effect(number=8 if not await rows(url) else 9))
            await session.commit()
        assert await rows(url) in ([], [(8,)])  # not yet committed

    raised, letters = await outcome(url, job, act)
    assert not raised
    assert not letters
    assert await rows(url) == [(8,), (9,)]


async def test_what_sqlalchemy_wrote_is_undone_with_its_handler(url, job):
    async def act(tx):
        async with tx.sqlalchemy() as connection:
            await connection.execute(text("INSERT INTO effect VALUES (1)"))
        raise OSError("away")

    _, letters = await outcome(url, job, act)
    assert letters == ["OSError: away"] * 2
    assert await rows(url) == []


# --- publishing within the user's transaction ---


async def with_asyncpg(url, publish, *, commit):
    connection = await asyncpg.connect(url)
    try:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("INSERT INTO effect VALUES (1)")
        await publish(connection)
        await (transaction.commit() if commit else transaction.rollback())
    finally:
        await connection.close()


async def with_psycopg(url, publish, *, commit):
    async with await psycopg.AsyncConnection.connect(url) as connection:
        await connection.execute("INSERT INTO effect VALUES (1)")
        await publish(connection)
        await (connection.commit() if commit else connection.rollback())


async def with_blocking_psycopg(url, publish, *, commit):
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO effect VALUES (1)")
        await publish(connection)
        (connection.commit if commit else connection.rollback)()


def with_session(driver):
    async def act(url, publish, *, commit):
        engine = create_async_engine(url.replace("postgresql", f"postgresql+{driver}"))
        async with AsyncSession(engine) as session:
            if driver == "asyncpg":  # the other one publishes first
                session.add(Effect(number=1))
                await session.flush()
            await publish(session)
            if driver != "asyncpg":
                session.add(Effect(number=1))
            await (session.commit() if commit else session.rollback())
        async with engine.connect() as connection:
            await publish(connection)  # left without a commit
        await engine.dispose()

    return act


JOINING = {
    "asyncpg": with_asyncpg, "psycopg": with_psycopg, "blocking psycopg": with_blocking_psycopg,
    "SQLAlchemy on asyncpg": with_session("asyncpg"), "SQLAlchemy on psycopg": with_session("psycopg"),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(JOINING))
async def test_what_is_published_within_your_transaction_leaves_exactly_when_you_commit(url, job, kind):
    service, seen = with_effects(), []

    @service.handle
    async def work(message: job) -> None:
        seen.append((message.number, await rows(url)))

    async with App(service, url) as app:

        async def publish(connection, number=1):
            await app.publish(job(number), within=connection)

        await JOINING[kind](url, publish, commit=False)
        await asyncio.sleep(0.2)
        assert seen == []
        await JOINING[kind](url, publish, commit=True)
        await until(lambda: seen)
        await asyncio.sleep(0.1)
    assert seen == [(1, [(1,)])]


async def test_publishing_within_what_has_no_transaction_or_is_no_connection_is_refused(url, job, tmp_path):
    service = Service("worker")
    async with App(service, url) as app:
        connection = await asyncpg.connect(url)
        with pytest.raises(PublishError, match="E316"):
            await app.publish(job(1), within=connection)
        await connection.close()
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as another:
            with pytest.raises(PublishError, match="E316"):
                await app.publish(job(1), within=another)
        with pytest.raises(PublishError, match="E315"):
            await app.publish(job(1), within=object())
    async with App(Service("other"), f"sqlite:///{tmp_path}/x.db") as app:
        with pytest.raises(ConfigurationError, match="E250"):
            await app.publish(job(1), within=object())


async def test_the_page_about_postgresql_does_what_it_says(url, tmp_path):
    await asyncio.to_thread(run_blocks, ROOT / "docs/how-to/postgresql.md", tmp_path, {"SHOP_DATABASE": url})


async def test_a_start_on_another_transport_warns_of_what_waits_in_the_schema(url, job, caplog):
    service = with_effects()

    @service.handle
    async def work(message: job) -> None: ...

    async with App(Service("outside"), url) as app:
        await app.publish(job(1))
    async with App(service, "memory:", store=url):
        pass
    assert "still holds 1 message of its own transport: jobs-" in caplog.text
    async with App(service, url) as app:
        async with asyncio.timeout(10):
            while sum(one.waiting for one in (await app.backlog()).values()):
                await asyncio.sleep(0.02)
    caplog.clear()
    async with App(service, "memory:", store=url):
        pass
    assert "still holds" not in caplog.text
