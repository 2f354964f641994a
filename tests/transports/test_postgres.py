"""PostgreSQL as transport and store: what is special to it, against a real server."""

# ruff: noqa: N803, N806 - functions give classes of messages

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit
from zlib import crc32

import asyncpg
import psycopg
import pytest

from tests import brokers
from tests.brokers import broker_url
from trunkline import App, Batch, Context, Queue, Service, Stream, Struct, System, Topic
from trunkline.clock import ManualClock, system_clock
from trunkline.errors import ConfigurationError, TransportError
from trunkline.stores.postgres.tables import DUE, FIRST_DUE, TAKE_CHANNELS
from trunkline.testing import soak
from trunkline.transport import parse_address
from trunkline.transports.postgres import inspector, readers
from trunkline.transports.postgres.tables import CLAIM

OWN = f"postgres@own-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
"""A server for the tests of this worker that stop it."""


@pytest.fixture
def server() -> str:
    return broker_url("postgres")


@pytest.fixture
async def url(server):
    """The server's URL with a schema of the test's own."""
    schema = f"t{secrets.token_hex(6)}"
    yield f"{server}?prefix={schema}"
    connection = await asyncpg.connect(server)
    await connection.execute(f'DROP SCHEMA IF EXISTS "{schema}" CASCADE')
    await connection.close()


def schema_of(url: str) -> str:
    return urlsplit(url).query.partition("prefix=")[2].partition("&")[0]


def another(url: str) -> str:
    """Return a URL of the same schema that this process takes for another: as another process would be."""
    return f"{url}&timeout_s={20 + secrets.randbelow(10**9) / 10**8}"


async def until(condition, within_s: float = 15.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


def channels():
    jobs, news, log = Queue("pg-jobs"), Topic("pg-news"), Stream("pg-log", key="key", partitions=4)

    @jobs.command
    class Job(Struct):
        number: int

    @news.event
    class News(Struct):
        number: int

    @log.event
    class Entry(Struct):
        key: str
        number: int

    return Job, News, Entry


def reading(name, cls, found):
    service = Service(name)

    @service.handle
    async def read(message: cls) -> None:
        found.append(message)

    return service


# --- what is declared, what is asked for ---


async def test_a_stream_with_other_partitions_is_refused(url, server):
    _, _, Entry = channels()
    async with App(reading("one", Entry, []), url):
        pass
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"UPDATE {schema_of(url)}.channel SET partitions = 8 WHERE name = 'pg-log'")
    with pytest.raises(ConfigurationError, match="E207 stream 'pg-log' with 4 partitions exists as stream with 8"):
        await App(reading("one", Entry, []), url).start()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("?prefetch=9", "E240"), ("?pool=0", "E241"), ("?prefix=A-b", "E241"), ("?sslmode=maybe", "E241"),
        ("?schema=shop", "E240"), ("?timeout_s=0", "E241"), ("?lease_s=soon", "E241"), ("?ca=/nowhere.pem", "E245"),
        ("?lease_s=0.1", "E241"),
    ],
)  # fmt: skip
async def test_what_a_url_cannot_ask_for_is_refused(server, change, code):
    with pytest.raises(ConfigurationError, match=code):
        await App(Service("one"), server + change).start()


async def test_a_url_without_a_database_is_refused():
    with pytest.raises(ConfigurationError, match="E206"):
        App(Service("one"), "postgresql://localhost")


async def test_a_database_that_does_not_exist_is_refused_at_once(server):
    with pytest.raises(ConfigurationError, match="E246"):
        await App(Service("one"), urlsplit(server)._replace(path="/nowhere").geturl()).start()


async def test_a_server_without_tls_is_told_apart_from_one_that_is_away(server):
    with pytest.raises(ConfigurationError, match="E245"):
        await App(Service("one"), f"{server}?sslmode=require").start()
    with pytest.raises(TransportError, match="E520"):
        await App(Service("one"), "postgresql://postgres@127.0.0.1:1/postgres?timeout_s=0.3").start()


async def test_a_wrong_password_is_refused_without_telling_it():
    right = broker_url("postgres:password")
    wrong = right.replace("postgres:", "postgres:", 1)
    parts = urlsplit(wrong)
    wrong = parts._replace(netloc=f"postgres:hush-hush@{parts.hostname}:{parts.port}").geturl()
    with pytest.raises(ConfigurationError, match="E244") as refused:
        await App(Service("one"), wrong).start()
    assert "hush" not in str(refused.value)
    async with App(Service("one"), f"{right}?prefix=t{secrets.token_hex(6)}"):
        pass
    brokers.stop("postgres:password")


async def test_a_user_who_may_not_create_a_schema_is_told_so(server):
    name = f"r{secrets.token_hex(6)}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {name} LOGIN")
        parts = urlsplit(server)
        url = parts._replace(netloc=f"{name}@{parts.hostname}:{parts.port}").geturl()
        with pytest.raises(ConfigurationError, match="E246"):
            await App(Service("one"), f"{url}?prefix={name}").start()
        admin.execute(f"DROP ROLE {name}")


async def test_a_schema_of_another_program_or_layout_is_left_alone(url, server):
    schema = schema_of(url)
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE SCHEMA {schema}")
        admin.execute(f"CREATE TABLE {schema}.invoice (id int)")
        with pytest.raises(ConfigurationError, match="E205"):
            await App(Service("one"), url).start()
        admin.execute(f"DROP TABLE {schema}.invoice")
        async with App(Service("one"), url):
            pass
        admin.execute(f"UPDATE {schema}.layout SET version = 99")
        with pytest.raises(ConfigurationError, match=r"E205 schema .* has layout 99, this release reads 2"):
            await App(Service("one"), url).start()


async def test_processes_that_start_at_once_on_an_empty_database_all_come_up(url):
    _, News, _ = channels()
    found = [[] for _ in range(4)]
    async with contextlib.AsyncExitStack() as stack:
        apps = [App(reading(f"reader{n}", News, found[n]), another(url)) for n in range(4)]
        await asyncio.gather(*(stack.enter_async_context(app) for app in apps))
        await apps[0].publish(News(1))
        await until(lambda: all(found))


async def test_a_pooler_in_transaction_mode_is_served_without_prepared_statements(url):
    Job, _, Entry = channels()
    jobs, entries = [], []
    first = App(reading("one", Job, jobs), f"{url}&statement_cache=0")
    second = App(reading("two", Entry, entries), f"{url}&statement_cache=0")
    async with first, second:
        await first.send(Job(1))
        await second.publish(Entry("a", 2))
        await until(lambda: jobs and entries)


# --- what is kept, and for how long ---


async def test_messages_and_handled_ids_are_forgotten_when_their_time_is_over(url, server):
    log = Stream("pg-short", key="key", partitions=2, retention_s=3600.0)

    @log.event
    class Short(Struct):
        key: str

    found, clock = [], ManualClock(time.time())
    async with App(reading("reader", Short, found), url, clock=clock) as app:
        await app.publish_all([Short(f"key {n}") for n in range(20)])
        await until(lambda: len(found) == 20)
        await app.publish_all([])  # a group writes the cursors of the one before
        clock._now += 3000
        await app.publish(Short("late"))
        await until(lambda: len(found) == 21)
        with psycopg.connect(server, autocommit=True) as connection:

            def rows(table):
                return connection.execute(f"SELECT count(*) FROM {schema_of(url)}.{table}").fetchone()[0]

            await app.store.tidy()
            await app.transport.tidy()
            assert (rows("log"), rows("inbox")) == (21, 21)
            clock._now += 1000
            await app.store.tidy()
            await app.transport.tidy()
            assert (rows("log"), rows("inbox")) == (1, 21)
            clock._now += 7 * 24 * 3600 - 3900
            await app.store.tidy()
            assert rows("inbox") == 1


async def test_a_replay_from_a_time_that_was_trimmed_begins_with_what_is_left(url):
    log = Stream("pg-replayed", key="key", partitions=2, retention_s=3600.0)

    @log.event
    class Old(Struct):
        key: str

    clock, service, found = ManualClock(time.time() - 7200), Service("replay"), []
    early, late = clock.now(), clock.now() + 2000

    @service.handle(start=datetime.fromtimestamp(early, UTC))
    async def note(message: Old) -> None:
        found.append(message.key)

    @service.handle(subscription="late", start=datetime.fromtimestamp(late, UTC))
    async def note_late(message: Old) -> None:
        found.append(f"late {message.key}")

    async with App(Service("publisher"), url, clock=clock) as app:
        for moment in range(3):
            await app.publish_all([Old(f"{moment}-{n}") for n in range(20)])
            clock._now += 1500
        await app.transport.tidy()
    async with App(service, url, clock=clock):
        await until(lambda: len(found) >= 60)
    left = [f"{moment}-{n}" for moment in (1, 2) for n in range(20)]
    assert sorted(found) == sorted([*left, *(f"late {key}" for key in left if key.startswith("2"))])


@pytest.mark.parametrize("transport", ["sqlite", "another schema"])
async def test_it_keeps_the_state_of_services_on_another_transport(url, server, tmp_path, transport):
    Job, News, Entry = channels()
    jobs, heard = [], []
    service = with_totals(Job, News, jobs, transaction=True)

    @service.handle
    async def hear(news: News) -> Entry:
        heard.append(news.number)
        return Entry("a", news.number)

    carrier = f"sqlite:///{tmp_path}/t.db" if transport == "sqlite" else f"{server}?prefix={schema_of(url)}x"
    entries = []
    async with App(System("both", [service, reading("reader", Entry, entries)]), carrier, store=url) as app:
        for _ in range(2):
            await asyncio.gather(*(app.send(Job(n), id=f"job {n}") for n in range(20)))
        await app.schedule(Job(99), timedelta(seconds=0.2))
        await until(lambda: len(entries) == 21)
        await asyncio.sleep(0.3)
    assert sorted(entry.number for entry in entries) == sorted(heard) == [*range(20), 99]
    if transport != "sqlite":
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"DROP SCHEMA {schema_of(url)}x CASCADE")


# --- several processes ---


async def test_queue_messages_are_shared_and_topics_copied(url):
    Job, News, _ = channels()
    done = [[], []]
    heard = [[], []]

    def service(n):
        worker = Service("worker")

        @worker.handle
        async def work(job: Job) -> None:
            done[n].append(job.number)
            await asyncio.sleep(0.002)

        return worker

    async with App(service(0), another(url)) as one, App(service(1), another(url)):
        first, second = (App(reading(name, News, heard[n]), another(url)) for n, name in enumerate("ab"))
        async with first, second:
            await asyncio.gather(*(one.send(Job(n)) for n in range(50)))
            await one.publish_all([News(n) for n in range(20)])
            await until(lambda: sum(map(len, done)) >= 50 and all(len(h) == 20 for h in heard))
    assert sorted(done[0] + done[1]) == list(range(50))
    assert sorted(n.number for n in heard[0]) == list(range(20))


async def test_what_one_process_publishes_wakes_another(url, monkeypatch):
    monkeypatch.setattr(readers, "POLL_S", 3600)
    Job, _, Entry = channels()
    found = []
    service = Service("worker")

    @service.handle
    async def work(job: Job) -> None:
        found.append(job)

    @service.handle
    async def read(entry: Entry) -> None:
        found.append(entry)

    async with App(service, another(url)), App(Service("other"), another(url)) as other:
        await asyncio.sleep(1.2)  # each knows of the other
        for message in (Job(1), Entry("a", 1)):
            found.clear()
            await other.publish(message)
            await until(lambda: found)


async def test_partitions_move_to_a_process_that_joins_and_back_in_order(url):
    _, _, Entry = channels()
    seen: dict[str, list[int]] = {}
    by: list[list[int]] = [[], []]

    def service(n):
        reader = Service("reader")

        @reader.handle
        async def read(entry: Entry) -> None:
            await asyncio.sleep(0.001)
            seen.setdefault(entry.key, []).append(entry.number)
            by[n].append(entry.number)

        return reader

    sent = 0
    async with App(service(0), another(url)) as one:

        async def publish(count):
            nonlocal sent
            await one.publish_all([Entry(f"key {n % 16}", sent + n) for n in range(count)])
            sent += count

        await publish(200)
        async with App(service(1), another(url)) as two:
            async with asyncio.timeout(30):
                while not by[1] or sent < 2200:
                    await publish(50)
                    await asyncio.sleep(0.05)
            first, second = (app.transport._readers["reader@pg-log"].partitions for app in (one, two))
            await until(lambda: sum(map(len, by)) >= sent and (len(first), len(second)) == (2, 2))
        await publish(100)
        await until(lambda: sum(map(len, by)) >= sent)
        async with asyncio.timeout(15):
            while (await one.transport.backlog(one._consumers[0].subscription)).waiting:
                await asyncio.sleep(0.02)
    assert sum(map(len, by)) == sent
    assert all(numbers == sorted(numbers) for numbers in seen.values())


async def test_positions_have_no_gaps_and_appear_in_order_beside_slow_commits(url, server):
    """A slow transaction must not hide what comes before from a reader that has gone past it."""
    _, _, Entry = channels()
    found = []
    service = Service("writer")

    async with App(reading("reader", Entry, found), another(url)), App(service, another(url)) as writer:
        running = writer.running("writer")

        async def slow(number: int) -> None:
            async with running.unit_of_work() as ctx:
                tx = await ctx.transaction()
                await tx.execute("SELECT pg_sleep(0.05)")
                ctx.publish(Entry(f"key {number % 8}", number))

        async def quick(start: int) -> None:
            for number in range(start, start + 40):
                await writer.publish(Entry(f"key {number % 8}", number))

        await asyncio.gather(*(slow(n) for n in range(20)), *(quick(1000 * n) for n in range(1, 6)))
        await until(lambda: len(found) >= 220)
    assert len({entry.number for entry in found}) == 220
    with psycopg.connect(server) as connection:
        rows = connection.execute(f"SELECT partition, position FROM {schema_of(url)}.log ORDER BY 1, 2").fetchall()
    for partition in range(4):
        positions = [position for number, position in rows if number == partition]
        assert positions == list(range(1, len(positions) + 1))


async def test_many_processes_append_to_one_stream_without_losing_or_doubling_a_position(url, server):
    _, _, Entry = channels()
    found = []
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(App(reading("reader", Entry, found), another(url)))
        writers = [await stack.enter_async_context(App(Service("writer"), another(url))) for _ in range(4)]

        async def write(n, app):
            for batch in range(30):
                await app.publish_all([Entry(f"key {k}", n * 10_000 + batch * 10 + k) for k in range(10)])

        await asyncio.gather(*(write(n, app) for n, app in enumerate(writers) for _ in range(1)))
        await until(lambda: len(found) >= 1200)
    assert len({entry.number for entry in found}) == len(found) == 1200
    with psycopg.connect(server) as connection:
        rows = connection.execute(
            f"SELECT partition, max(position), count(*) FROM {schema_of(url)}.log GROUP BY 1"
        ).fetchall()
    assert all(last == count for _, last, count in rows)


# --- processes that die, servers that go ---


class Proxy:
    """Passes bytes on, and cuts the connection when the server has got a word and has answered, unheard."""

    def __init__(self, server: str) -> None:
        parts = urlsplit(server)
        self._place = parts.hostname, parts.port
        self._parts = parts
        self.word: bytes | None = None
        self.cuts = 0

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self._tasks = set()
        port = self._server.sockets[0].getsockname()[1]
        self.url = self._parts._replace(netloc=f"postgres@127.0.0.1:{port}").geturl()
        return self

    async def __aexit__(self, *_error):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        from_server, to_server = await asyncio.open_connection(*self._place)
        cut = asyncio.Event()

        async def there():
            while data := await reader.read(65536):
                if self.word is not None and self.word in data:
                    self.word = None
                    self.cuts += 1
                    cut.set()
                to_server.write(data)

        async def back():
            while data := await from_server.read(65536):
                if cut.is_set():  # it has done it, and nobody hears of it
                    writer.transport.abort()
                    break
                writer.write(data)

        # Whichever side ends, and however, the other is told.
        ways = [asyncio.create_task(way()) for way in (there, back)]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            ended = await asyncio.gather(*ways, return_exceptions=True)
            for side in (writer, to_server):
                side.close()
                with contextlib.suppress(OSError):
                    await side.wait_closed()
            assert all(error is None or isinstance(error, OSError | asyncio.CancelledError) for error in ended), ended


@pytest.mark.parametrize("kind", ["at once", "in a group", "from a handler", "in a transaction"])
async def test_what_was_committed_though_the_answer_was_lost_is_not_done_again(url, server, kind):
    Job, News, Entry = channels()
    heard, done = [], []
    service = with_totals(Job, News, done, transaction=kind == "in a transaction")
    schema = schema_of(url)
    async with Proxy(server) as proxy, App(reading("reader", News, heard), url):  # noqa: SIM117 - needs its URL
        async with App(service, f"{proxy.url}?prefix={schema}") as app:
            await asyncio.sleep(0.2)
            if kind == "at once":
                proxy.word = b"WITH fence"  # the statement is prepared on its first use
                await app.publish(Entry("a", 1))
                proxy.word = b"entry"
                await app.publish(Entry("a", 2))
            elif kind == "in a group":
                proxy.word = b"COMMIT"
                await app.publish(News(1))
                await until(lambda: heard)
            else:
                proxy.word = b"COMMIT"
                await app.send(Job(1))
                await until(lambda: heard)
            await asyncio.sleep(1.5)
            assert proxy.cuts
            if kind == "at once":
                with psycopg.connect(server) as connection:
                    found = connection.execute(f"SELECT count(*) FROM {schema}.log").fetchone()
                assert found == (2,)
            else:
                assert [news.number for news in heard] == [1]


def with_totals(Job, News, done, *, transaction):
    service = Service("worker")

    @service.handle
    async def work(job: Job, ctx: Context) -> News:
        if transaction:
            await ctx.transaction()
        done.append(job.number)
        return News(job.number)

    return service


CONSUMER = """
import asyncio, sys
from trunkline import App, Context, Queue, Service, Stream, Struct

jobs, log = Queue("pg-jobs"), Stream("pg-log", key="key", partitions=4)

@jobs.command
class Job(Struct):
    number: int

@log.event
class Entry(Struct):
    key: str
    number: int

service = Service("worker")

@service.handle
async def work(job: Job, ctx: Context) -> None:
    tx = await ctx.transaction()
    await tx.execute(f"INSERT INTO {sys.argv[2]} VALUES ('job', $1)", (job.number,))
    if job.number == 7:
        print("stuck", flush=True)
        await asyncio.sleep(3600)

@service.handle
async def read(entry: Entry, ctx: Context) -> None:
    tx = await ctx.transaction()
    await tx.execute(f"INSERT INTO {sys.argv[2]} VALUES ('entry', $1)", (entry.number,))

App(service, sys.argv[1]).run()
"""


@pytest.fixture
async def effects(url, server):
    """A table of effects, with how to read it."""
    table = f"effect_{schema_of(url)}"
    connection = await asyncpg.connect(server)
    await connection.execute(f"CREATE TABLE {table} (kind text, number int)")

    async def read(kind=None):
        rows = await connection.fetch(f"SELECT number FROM {table} WHERE $1::text IS NULL OR kind = $1", kind)
        return sorted(row[0] for row in rows)

    read.table = table
    yield read
    await connection.execute(f"DROP TABLE {table}")
    await connection.close()


def spawn(tmp_path: Path, url: str, table: str) -> subprocess.Popen[str]:
    program = tmp_path / "consumer.py"
    program.write_text(CONSUMER)
    return subprocess.Popen([sys.executable, str(program), url, table], stdout=subprocess.PIPE, text=True)


def working(Job, Entry, table, seen):
    service = Service("worker")

    @service.handle
    async def work(job: Job, ctx: Context) -> None:
        tx = await ctx.transaction()
        await tx.execute(f"INSERT INTO {table} VALUES ('job', $1)", (job.number,))
        seen.append(job.number)

    @service.handle
    async def read(entry: Entry, ctx: Context) -> None:
        tx = await ctx.transaction()
        await tx.execute(f"INSERT INTO {table} VALUES ('entry', $1)", (entry.number,))

    return service


async def test_what_a_killed_process_had_is_handled_by_another_at_once(url, effects, tmp_path):
    Job, _, Entry = channels()
    seen = []
    process = spawn(tmp_path, url, effects.table)
    try:
        async with App(Service("publisher"), another(url)) as publisher:
            await publisher.publish_all([Job(n) for n in range(50)])
            await publisher.publish_all([Entry(f"key {n}", n) for n in range(50)])
            assert await asyncio.to_thread(process.stdout.readline) == "stuck\n"
            await asyncio.sleep(0.3)
            process.kill()
            process.wait()
            began = time.monotonic()
            async with App(working(Job, Entry, effects.table, seen), another(url)):
                async with asyncio.timeout(15):
                    while await effects("job") != list(range(50)) or await effects("entry") != list(range(50)):
                        await asyncio.sleep(0.02)
            assert time.monotonic() - began < 10
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert 7 in seen


async def test_a_process_that_was_silent_for_a_lease_commits_nothing_of_what_others_took(url, effects, tmp_path):
    Job, _, Entry = channels()
    seen = []
    process = spawn(tmp_path, f"{url}&lease_s=2", effects.table)
    try:
        async with App(Service("publisher"), another(f"{url}&lease_s=2")) as publisher:
            await publisher.publish_all([Job(n) for n in range(10)])
            assert await asyncio.to_thread(process.stdout.readline) == "stuck\n"
            process.send_signal(signal.SIGSTOP)
            async with App(working(Job, Entry, effects.table, seen), another(f"{url}&lease_s=2")):
                await until(lambda: 7 in seen, 20)
                process.send_signal(signal.SIGCONT)
                await publisher.publish_all([Job(n) for n in range(10, 60)])
                async with asyncio.timeout(15):
                    while await effects("job") != list(range(60)):
                        await asyncio.sleep(0.02)
                await asyncio.sleep(1.5)
                assert await effects("job") == list(range(60))
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        process.stdout.close()


def shared_log(Entry, seen, go=None):
    service = Service("reader")

    @service.handle
    async def read(entry: Entry) -> None:
        if go is not None:
            await go.wait()
        seen.add(entry.number)

    return service


def partitions_of(*apps):
    return tuple(len(app.transport._readers["reader@pg-log"].partitions) for app in apps)


async def taken_over(app, by):
    """Let `by` treat the process of `app` as dead, as after a restart of the server that it came back from late."""
    engine, number = by.transport.engine, app.transport.engine.process
    await engine.run(lambda connection: engine.members._take_over(connection, number))
    await until(lambda: app.transport.engine.process != number and app.transport.engine.link.is_up)


async def test_a_process_that_is_taken_over_while_it_gives_partitions_up_reads_on(url):
    _, _, Entry = channels()
    seen, go = set(), asyncio.Event()
    async with App(shared_log(Entry, seen, go), another(url)) as one:
        await one.publish_all([Entry(f"key {n}", n) for n in range(64)])
        giving_up = one.transport._readers["reader@pg-log"].partitions.values()
        await until(lambda: all(len(state.watermark) for state in giving_up))
        async with App(shared_log(Entry, seen), another(url)) as two:
            await until(lambda: any(state.leaving for state in giving_up))
            await taken_over(one, by=two)
            try:
                await until(lambda: partitions_of(one, two) == (2, 2), 9)
            finally:
                go.set()
            await two.publish_all([Entry(f"key {n}", n) for n in range(64, 128)])
            await until(lambda: len(seen) == 128)


def keys_of(*partitions):
    """Return keys whose messages are in one of these partitions of four."""
    return [key for key in (f"key {n}" for n in range(64)) if crc32(key.encode()) % 4 in partitions]


async def test_a_process_whose_whole_inflow_moves_away_reads_on(url):
    _, _, Entry = channels()
    seen, others, go = set(), set(), asyncio.Event()
    leaving = keys_of(2, 3)
    async with App(shared_log(Entry, seen, go), another(url)) as one:
        await one.publish_all([Entry(leaving[n % len(leaving)], n) for n in range(2500)])
        inflow = one.transport._readers["reader@pg-log"].inflow
        await until(lambda: inflow._writers)
        async with App(shared_log(Entry, others), another(url)) as two:
            await until(lambda: not len(inflow))
            go.set()
            await until(lambda: partitions_of(one, two) == (2, 2))
            await two.publish_all([Entry(key, 10_000 + n) for n, key in enumerate(keys_of(0, 1))])
            await until(lambda: len(seen | others) == 2500 + len(keys_of(0, 1)))
            assert max(seen) >= 10_000


@pytest.mark.parametrize("label", ["reader@pg-jobs", "reader@pg-log"])
async def test_a_process_that_is_taken_over_while_its_inflow_is_full_reads_on(url, label):
    Job, _, Entry = channels()
    seen, go = set(), asyncio.Event()
    made = [Job(n) if label == "reader@pg-jobs" else Entry(f"key {n}", n) for n in range(2500)]
    service = shared_log(type(made[0]), seen, go)
    async with App(service, another(url)) as app, App(Service("publisher"), another(url)) as other:
        await other.publish_all(made)
        inflow = app.transport._readers[label].inflow
        await until(lambda: inflow._writers)
        await taken_over(app, by=other)
        await until(lambda: not len(inflow))
        go.set()
        await until(lambda: len(seen) == len(made))


def in_batches_of_one(Entry, seen, go):
    service = Service("reader")

    @service.handle(batch=Batch(size=1))
    async def read(entries: list[Entry]) -> None:
        await go.wait()
        seen.update(entry.number for entry in entries)

    return service


@pytest.mark.parametrize("service", [shared_log, in_batches_of_one])
async def test_what_waits_of_a_partition_that_was_given_up_does_not_begin(url, monkeypatch, service):
    monkeypatch.setattr(readers, "CLOSE_S", 0.2)
    _, _, Entry = channels()
    first, second, go, answered = set(), set(), asyncio.Event(), asyncio.Event()
    (key, *_) = keys_of(3)
    async with App(service(Entry, first, go), another(url)) as one:
        await one.publish_all([Entry(key, n) for n in range(10)])
        (consumer,) = one._consumers
        await until(lambda: consumer._under_way == 10)
        load = consumer.parking.load

        async def late():
            await answered.wait()
            await load()

        consumer.parking.load = late
        async with App(shared_log(Entry, second), another(url)) as two:
            await until(lambda: partitions_of(one, two) == (2, 2))
            await until(lambda: second >= set(range(1, 10)))
            go.set()
            await until(lambda: consumer._under_way == 0)
            assert first == {0}
            answered.set()
            await two.publish_all([Entry(other, 10) for other in keys_of(0, 1)])
            await until(lambda: 10 in first)


async def test_a_process_that_is_a_store_only_gives_back_all_that_a_dead_one_held(url, tmp_path):
    Job, _, _ = channels()
    seen, go = [], asyncio.Event()
    service = Service("worker")

    @service.handle
    async def work(job: Job) -> None:
        await go.wait()
        seen.append(job.number)

    beside = App(Service("beside"), f"sqlite:///{tmp_path}/t.db", store=another(url))
    async with App(service, url) as app, beside:
        await app.publish(Job(1))
        reader = app.transport._readers["worker@pg-jobs"]
        await until(lambda: reader.held)
        engine, number = beside.store.engine, app.transport.engine.process
        await engine.run(lambda connection: engine.members._take_over(connection, number))
        owners = engine.sql("SELECT count(*) FROM @message WHERE owner = $1")
        assert (await engine.fetch(owners, number))[0][0] == 0
        go.set()
        await until(lambda: seen)


async def test_a_process_that_was_taken_over_claims_nothing_more(url):
    Job, _, _ = channels()
    async with App(Service("publisher"), url) as publisher, App(Service("other"), another(url)) as other:
        await publisher.publish_all([Job(number) for number in range(3)])
        engine, number = publisher.transport.engine, other.transport.engine.process
        await taken_over(other, by=publisher)
        # Its claim was on the way, or waited for the connection, when it was declared dead.
        claim = engine.sql(CLAIM)
        assert await engine.fetch(claim, number, 0, 2**62, 10) == []
        assert len(await engine.fetch(claim, engine.process, 0, 2**62, 10)) == 3


async def test_a_partition_that_is_a_process_s_by_name_only_is_read_again(url):
    _, _, Entry = channels()
    seen = set()
    async with App(shared_log(Entry, seen), another(url)) as one, App(shared_log(Entry, seen), another(url)) as two:
        await until(lambda: partitions_of(one, two) == (2, 2))
        ownership = one.transport._readers["reader@pg-log"].ownership
        leases, keep = ownership._leases, ownership._leases.keep

        async def unanswered(held):
            raise TransportError("E520", "not reached")

        # For longer than a lease, though nobody else has seen that: the server was away for all.
        ownership._renewed -= 100
        leases.keep = unanswered
        await until(lambda: partitions_of(one, two) == (0, 2))
        leases.keep = keep
        await until(lambda: partitions_of(one, two) == (2, 2))
        await two.publish_all([Entry(f"key {n}", n) for n in range(64)])
        await until(lambda: len(seen) == 64)


async def test_a_new_number_whose_confirmation_was_lost_is_not_taken_for_the_old_one(url, server):
    _, _, Entry = channels()
    seen, schema = set(), schema_of(url)
    async with Proxy(server) as proxy, App(Service("other"), url) as other:  # noqa: SIM117 - needs its URL
        async with App(shared_log(Entry, seen), f"{proxy.url}?prefix={schema}") as app:
            proxy.word = b"COMMIT"
            await taken_over(app, by=other)
            assert proxy.cuts == 1
            await until(lambda: partitions_of(app) == (4,))
            await other.publish_all([Entry(f"key {n}", n) for n in range(64)])
            await until(lambda: len(seen) == 64)
            with psycopg.connect(server) as connection:
                members = connection.execute(f"SELECT process FROM {schema}.member").fetchall()
            assert members == [(app.transport.engine.process,)]


@pytest.mark.parametrize("store", ["same", "sqlite:///{}/s.db"])
@pytest.mark.parametrize("task", ["balance", "reader", "lease", "writer"])
async def test_a_task_of_the_adapter_that_ends_by_an_error_ends_the_app(url, tmp_path, task, store):
    _, _, Entry = channels()

    def fail(*_):
        raise ZeroDivisionError(task)

    async with App(shared_log(Entry, set()), url, store=url if store == "same" else store.format(tmp_path)) as app:
        transport = app.transport
        holder, name = {
            "balance": (transport, "_balance"),
            "reader": (transport._readers["reader@pg-log"], "load"),
            "lease": (transport.engine.members, "sweep"),
            "writer": (transport.engine, "_commit"),
        }[task]
        setattr(holder, name, fail)
        if task == "writer":
            with pytest.raises(TransportError, match="E520"):
                await app.publish(Entry("a", 1))
        with pytest.raises(ZeroDivisionError, match=task):
            async with asyncio.timeout(20):
                await app.ended()


@pytest.mark.timeout(180)
async def test_a_server_that_is_killed_and_comes_back_loses_and_doubles_nothing(effects_on_own_server):
    url, table, read = effects_on_own_server
    Job, _, Entry = channels()
    confirmed: list[int] = []
    unknown: list[int] = []
    seen = []
    going = True

    async with App(working(Job, Entry, table, seen), url) as app, App(Service("publisher"), another(url)) as publisher:

        async def publish(start: int) -> None:
            number = start
            while going:
                message = Job(number) if number % 2 else Entry(f"key {number % 13}", number)
                try:
                    await publisher.publish(message)
                except TransportError as error:
                    assert error.code in ("E520", "E521")  # noqa: PT017
                    unknown.append(number)
                else:
                    confirmed.append(number)
                number += 1
                await asyncio.sleep(0.01)  # no faster than a busy machine handles them: all must be in the end

        tasks = [asyncio.create_task(publish(n * 100_000)) for n in range(1, 5)]
        for act in ("kill", "restart", "kill"):
            await asyncio.sleep(1)
            if act == "kill":
                await asyncio.to_thread(brokers.kill, OWN)
                await asyncio.to_thread(brokers.resume, OWN)
            else:
                await asyncio.to_thread(brokers.restart, OWN)
            before = len(confirmed)
            await until(lambda b=before: len(confirmed) > b + 40, 30)
        going = False
        await asyncio.gather(*tasks)
        async with asyncio.timeout(40):
            while not set(confirmed) <= set(await read()):
                await asyncio.sleep(0.1)
        found = await read()
        del app
    assert len(found) == len(set(found))
    assert set(found) - set(confirmed) <= set(unknown)
    assert len(confirmed) > 100


def soaking(url, folder, said, *arguments):
    options = soak.parser().parse_args([url, "--store", url, *arguments])
    return soak.Soak(options, folder, said.append)


async def test_a_soak_reads_effects_again_when_the_server_that_keeps_them_is_back(effects_on_own_server, tmp_path):
    url, _, _ = effects_on_own_server
    said = []
    run = soaking(url, tmp_path, said)
    await asyncio.to_thread(brokers.kill, OWN)
    reading = asyncio.create_task(run.done())
    await until(lambda: said or reading.done())
    assert not reading.done()
    await asyncio.to_thread(brokers.resume, OWN)
    assert await reading == []
    assert len(said) == 1
    assert said[0].startswith("the effects cannot be read, waiting up to 60 s for their store: E520")


@pytest.mark.timeout(120)
def test_a_soak_whose_server_stays_away_ends_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(soak, "AWAY_S", 1.0)
    server = broker_url(OWN)
    kill = f"{sys.executable} -m scripts.brokers kill {OWN}"
    try:
        arguments = ["--messages", "4000", "--kills", "0", "--pause", "0.01", "--keys", "4", "--folder", str(tmp_path)]
        assert soak.main([server, "--store", server, "--restart-broker", kill, *arguments]) == 1
    finally:
        brokers.stop(OWN, wipe=True)
    said = capsys.readouterr().out
    assert "waiting up to 1 s for their store" in said
    assert "FAILED, seed" in said
    assert "E520" in said.partition("FAILED, seed")[2]


@pytest.fixture
async def effects_on_own_server():
    server = broker_url(OWN)
    connection = await asyncpg.connect(server)
    await connection.execute("DROP TABLE IF EXISTS effect; CREATE TABLE effect (kind text, number int)")
    await connection.close()

    async def read():
        connection = await asyncpg.connect(server)
        try:
            return sorted(row[0] for row in await connection.fetch("SELECT number FROM effect"))
        finally:
            await connection.close()

    yield f"{server}?prefix=t{secrets.token_hex(6)}", "effect", read
    brokers.stop(OWN, wipe=True)


async def test_a_channel_is_declared_at_its_first_message_and_known_from_then_on(url):
    Job, _News, _Entry = channels()
    async with App(Service("publisher"), url) as app:
        declare, asked = app.transport._declare_channel, []

        async def declare_noted(connection, channel, routes):
            asked.append(channel.name)
            return await declare(connection, channel, routes)

        app.transport._declare_channel = declare_noted
        await app.publish(Job(1))
        await asyncio.gather(*(app.publish(Job(number)) for number in range(100)))
    assert len(asked) == 1


async def test_half_of_many_publishers_go_on_while_the_other_half_is_told(url):
    """So the server and they work at the same time; all of them are told, in the order of their messages."""
    Job, _News, _Entry = channels()
    async with App(Service("publisher"), url) as app:
        await app.publish(Job(0))
        told = []

        async def publish(number):
            await app.publish(Job(number))
            told.append(number)

        committed = asyncio.get_running_loop().create_future()
        finish = app.transport.engine._finish

        def finish_noted(entries, *words, **options):
            finish(entries, *words, **options)
            asyncio.get_running_loop().call_soon(lambda: asyncio.get_running_loop().call_soon(note))

        def note():
            if not committed.done():
                committed.set_result(len(told))

        app.transport.engine._finish = finish_noted
        await asyncio.gather(*(publish(number) for number in range(100)))
        assert committed.result() == 50
        assert told == list(range(100))


async def test_the_outbox_is_read_page_by_page(url, monkeypatch):
    monkeypatch.setattr(inspector, "PAGE", 2)
    first, second, service = Queue("outbox-first"), Queue("outbox-second"), Service("outboxed")

    @first.command(type="first")
    class First(Struct):
        number: int

    @second.command(type="second")
    class Second(Struct):
        number: int

    @service.handle
    async def do_first(_job: First) -> None: ...

    @service.handle
    async def do_second(_job: Second) -> None: ...

    async with App(service, url) as app:
        for number in range(5):
            await app.schedule(First(number), timedelta(hours=5 - number))
            await app.schedule(Second(number), timedelta(hours=5 - number))
    looker = inspector.PostgresInspector(parse_address(url), system_clock)
    await looker.open()
    try:
        everything, more = await looker.outbox(None, None, 4)
        assert ([one.channel for one in everything], more) == (["outbox-first", "outbox-second"] * 2, 6)
        for chosen in (("outbox-second", None), (None, "second")):
            found, more = await looker.outbox(*chosen, 3)
            assert ([one.message.type for one in found], more) == (["second"] * 3, 2)
            assert [one.due for one in found] == sorted(one.due for one in found)
        assert await looker.outbox("outbox", None, 3) == ([], 0)
    finally:
        await looker.close()


async def test_what_waits_for_other_channels_is_not_read_again_and_again(url):
    rows = 5000
    async with App(Service("sender"), url) as app:
        engine = app.store.engine

        async def read(connection) -> int:
            """Return how many rows were read to find one of ours among those of a channel that nobody has."""
            stage = engine.sql("INSERT INTO @outbox (due, channel, event) SELECT 0, $1, '' FROM generate_series(1, $2)")
            await connection.execute(stage, "taken-away", rows)
            await connection.execute(stage, "ours", 1)
            await connection.execute(engine.sql("ANALYZE @outbox"))
            count = engine.sql(
                "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relid = '@outbox'::regclass"
            )
            before = await connection.fetchval(count)
            assert await connection.fetchval(engine.sql(FIRST_DUE), ["ours", "never-used"]) == 0
            assert await connection.fetch(engine.sql(TAKE_CHANNELS), engine.process, 1.0, ["ours"]) == [("ours",)]
            assert len(await connection.fetch(engine.sql(DUE), 1.0, ["ours"], 500)) == 1
            return await connection.fetchval(count) - before

        assert await engine.run(read) < rows
        await app.store._execute("DELETE FROM @outbox")
