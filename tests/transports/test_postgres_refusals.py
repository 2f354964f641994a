"""PostgreSQL refuses statements for a while: permissions are withdrawn, tables are away, disks are full.

What no message is to blame for is done again until the server takes it; what one is to blame for is its own failure.
"""

import asyncio
import secrets
from datetime import timedelta
from urllib.parse import urlsplit

import asyncpg
import psycopg
import pytest

from tests.brokers import broker_url
from trunkline import App, Context, Queue, Retry, Service, Stream, Struct
from trunkline.errors import DefinitionError, StoreFullError, StoreLostError, TransportError

ONCE = Retry(immediate=0, delays_s=())
SOON = Retry(immediate=0, delays_s=(0.05,))


class Server:
    """A database of the test's own as its administrator sees it, and the URL of a user who may be refused things."""

    def __init__(self, url: str, role: str) -> None:
        parts = urlsplit(url)
        self.role = role
        self.url = parts._replace(netloc=f"{role}@{parts.hostname}:{parts.port}").geturl()
        self._admin = psycopg.connect(url, autocommit=True)
        self.execute(f"GRANT CREATE ON DATABASE {parts.path[1:]} TO {role}; GRANT CREATE ON SCHEMA public TO {role}")

    def execute(self, sql: str) -> list[tuple]:
        cursor = self._admin.execute(sql.replace("@", "trunkline."))
        return cursor.fetchall() if cursor.description else []

    def revoke(self, what: str, table: str) -> None:
        self.execute(f"REVOKE {what} ON @{table} FROM {self.role}")

    def grant(self, what: str, table: str) -> None:
        self.execute(f"GRANT {what} ON @{table} TO {self.role}")

    def trip(self, table: str, state: str, *, deferred: bool = False) -> None:
        """Let changes of `table` fail with SQLSTATE `state`: at once, or deferred to the commit."""
        kind, when = ("CONSTRAINT TRIGGER", "DEFERRABLE INITIALLY DEFERRED") if deferred else ("TRIGGER", "")
        self.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN RAISE EXCEPTION 'refused' USING ERRCODE = '{state}'; END $$;"
            f" CREATE {kind} refuse AFTER INSERT OR UPDATE ON {table} {when} FOR EACH ROW EXECUTE FUNCTION refuse()"
        )

    def untrip(self) -> None:
        self.execute("DROP FUNCTION refuse CASCADE")

    def close(self) -> None:
        self._admin.close()


@pytest.fixture
def role():
    name = f"r{secrets.token_hex(6)}"
    with psycopg.connect(broker_url("postgres"), autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {name} LOGIN")
        yield name
        admin.execute(f"DROP ROLE {name}")


@pytest.fixture
def server(role, database):
    """Depends on `role` first, so that the role goes after everything it owns."""
    found = Server(database, role)
    yield found
    found.close()


@pytest.fixture
def jobs():
    channel = Queue(f"jobs-{secrets.token_hex(4)}")

    @channel.command
    class Job(Struct):
        number: int

    return Job


@pytest.fixture
def entries():
    channel = Stream(f"entries-{secrets.token_hex(4)}", key="key", partitions=2)

    @channel.event
    class Entry(Struct):
        key: str
        text: str = ""

    return Entry


async def until(condition, within_s: float = 15.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


def worker(kind, found: list, *, in_transaction: bool = False, retry: Retry = ONCE) -> Service:
    """Return a service whose handler notes each message that it handled to the end."""
    service = Service("worker")
    service.schema("CREATE TABLE IF NOT EXISTS effect (text text)")

    @service.handle(retry=retry)
    async def work(message: kind, ctx: Context) -> None:
        if in_transaction:
            tx = await ctx.transaction()
            await tx.execute("INSERT INTO effect VALUES ('done')")
        found.append(message)

    return service


def another(url: str) -> str:
    """Return a URL of the same schema that this process takes for another: as another process would be."""
    return f"{url}?timeout_s={20 + secrets.randbelow(10**9) / 10**8}"


# --- the connection on which groups are written ---


FAULTS = {
    "the first statement": (
        lambda server: server.revoke("UPDATE", "process"), lambda server: server.grant("UPDATE", "process"), "E506",
    ),
    "no room at the first statement": (
        lambda server: server.trip("@process", "53100"), lambda server: server.untrip(), "E502",
    ),
    "the words to others": (
        lambda server: server.execute("REVOKE EXECUTE ON FUNCTION pg_notify(text, text) FROM PUBLIC"),
        lambda server: server.execute("GRANT EXECUTE ON FUNCTION pg_notify(text, text) TO PUBLIC"), "E506",
    ),
    "no limit of a unit at the commit": (
        lambda server: server.trip("@process", "54000", deferred=True), lambda server: server.untrip(), "E506",
    ),
}  # fmt: skip


async def stage_something(app: App, job: type) -> None:
    await app.schedule(job(0), timedelta(days=1))


async def run_something(app: App, _job: type) -> None:
    engine = app.transport.engine  # type: ignore[attr-defined]

    async def tell(_connection: asyncpg.Connection) -> None:
        engine.tell({"staged"})

    await engine.run(tell)


@pytest.mark.parametrize("act", [stage_something, run_something])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_transaction_that_cannot_begin_or_end_is_undone_and_the_next_is_not_hurt(server, jobs, fault, act):
    begin, end, code = FAULTS[fault]
    found = []
    app, other = App(worker(jobs, found), server.url), App(Service("other"), another(server.url))
    async with app, other:
        await until(lambda: not app.transport.engine.members.alone)
        begin(server)
        for _ in range(3):
            with pytest.raises(TransportError) as refused:
                await act(app, jobs)
            assert refused.value.code == code
            assert "aborted" not in str(refused.value)
        end(server)
        await act(app, jobs)
        await app.send(jobs(1))
        await until(lambda: found)
        assert not app._ended.done()


# --- units that nobody is to blame for ---


REFUSED = [
    ("inbox", "REVOKE INSERT ON @inbox FROM {role}", "GRANT INSERT ON @inbox TO {role}"),
    ("inbox away", "ALTER TABLE @inbox RENAME TO away", "ALTER TABLE @away RENAME TO inbox"),
    ("settlement", "REVOKE DELETE ON @message FROM {role}", "GRANT DELETE ON @message TO {role}"),
]


@pytest.mark.parametrize("in_transaction", [False, True])
@pytest.mark.parametrize(("begin", "end"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
async def test_what_the_server_refuses_is_no_failure_of_the_handler(server, jobs, caplog, begin, end, in_transaction):
    found = []
    async with App(worker(jobs, found, in_transaction=in_transaction), server.url) as app:
        server.execute(begin.format(role=server.role))
        await app.send(jobs(1))
        await until(lambda: "worker@" in caplog.text and "again in 1 s: E506" in caplog.text)
        server.execute(end.format(role=server.role))
        await until(lambda: server.execute("SELECT 1 FROM @inbox") and not server.execute("SELECT 1 FROM @message"))
        assert await app.store.dead_letters() == []
        assert not app._ended.done()
    assert len(server.execute("SELECT * FROM effect")) == in_transaction


async def test_a_failure_that_cannot_be_parked_yet_is_not_lost_and_not_a_dead_letter(server, entries, caplog):
    service, seen = Service("worker"), []

    @service.handle(retry=SOON)
    async def work(entry: entries, ctx: Context) -> None:
        seen.append(ctx.attempt)
        if ctx.attempt == 0:
            raise ConnectionError("away")

    async with App(service, server.url) as app:
        server.revoke("INSERT", "parked")
        await app.publish(entries("a"))
        await until(lambda: "permission denied for table parked" in caplog.text)
        server.grant("INSERT", "parked")
        await until(lambda: 1 in seen)
        await until(lambda: server.execute("SELECT 1 FROM @inbox"))
        assert await app.store.dead_letters() == []


async def test_a_commit_of_the_handlers_for_which_there_is_no_room_is_done_again(server, jobs, caplog):
    found = []
    async with App(worker(jobs, found, in_transaction=True), server.url) as app:
        server.trip("effect", "53100", deferred=True)
        await app.send(jobs(1))
        await until(lambda: "again in 1 s: E502" in caplog.text)
        server.untrip()
        await until(lambda: server.execute("SELECT 1 FROM effect"))
        assert await app.store.dead_letters() == []


@pytest.mark.parametrize("where", ["at once", "at the commit"])
@pytest.mark.parametrize("state", ["42501", "23514", "P0001"])
async def test_what_the_users_own_statements_meet_is_the_handlers_failure(server, jobs, where, state):
    async with App(worker(jobs, [], in_transaction=True), server.url) as app:
        server.trip("effect", state, deferred=where == "at the commit")
        await app.send(jobs(1))
        await until(lambda: server.execute("SELECT 1 FROM @dead_letter"))
        (letter,) = await app.store.dead_letters()
        assert (letter.code, "refused" in letter.reason) == ("handler", True)
        server.untrip()
        await app.send(jobs(2))
        await until(lambda: server.execute("SELECT 1 FROM effect"))


async def test_a_failure_that_the_handler_hid_is_the_handlers(server, jobs):
    service = Service("worker")

    @service.handle(retry=ONCE)
    async def work(_message: jobs, ctx: Context) -> None:
        tx = await ctx.transaction()
        try:
            await tx.asyncpg.execute("SELECT 1 FROM nowhere")
        except asyncpg.UndefinedTableError:
            return

    async with App(service, server.url) as app:
        await app.send(jobs(1))
        await until(lambda: server.execute("SELECT 1 FROM @dead_letter"))
        (letter,) = await app.store.dead_letters()
        assert letter.code == "handler"


@pytest.mark.parametrize("in_transaction", [False, True])
async def test_a_unit_whose_data_the_server_does_not_take_fails_alone(server, jobs, entries, in_transaction):
    service, seen = Service("worker"), []

    @service.handle(retry=ONCE)
    async def work(message: jobs, ctx: Context) -> entries:
        if in_transaction:
            await ctx.transaction()
        seen.append(message.number)
        return entries("a", "x" * message.number)

    async with App(service, server.url) as app:
        server.execute("ALTER TABLE @log ADD CHECK (octet_length(event) < 5000)")
        for number in (10, 6000, 20):
            await app.send(jobs(number))
        await until(lambda: len(server.execute("SELECT 1 FROM @log")) == 2)
        await until(lambda: server.execute("SELECT 1 FROM @dead_letter"))
        (letter,) = await app.store.dead_letters()
        assert (letter.code, "check constraint" in letter.reason) == ("handler", True)


async def test_what_cannot_even_be_set_aside_is_done_again_with_pauses_and_in_nobodys_way(server, jobs, caplog):
    service, found = Service("worker"), []

    @service.handle(retry=ONCE)
    async def work(message: jobs) -> None:
        if message.number == 1:
            raise ValueError("bad")
        found.append(message)

    async with App(service, server.url) as app:
        server.execute("ALTER TABLE @dead_letter ADD CONSTRAINT none CHECK (seq < 0)")
        await app.send(jobs(1))
        await until(lambda: caplog.text.count("the store refused a commit, again in 1 s") > 1)
        ((tries,),) = server.execute("SELECT last_value FROM @dead_letter_seq_seq")
        assert tries < 10
        await app.send(jobs(2))
        await until(lambda: found)
        server.execute("ALTER TABLE @dead_letter DROP CONSTRAINT none")
        await until(lambda: server.execute("SELECT 1 FROM @dead_letter"))
        (letter,) = await app.store.dead_letters()
        assert letter.reason == "ValueError: bad"


# --- what is done besides ---


async def test_the_outbox_is_relayed_when_the_server_takes_it_again(server, jobs, caplog):
    found = []
    async with App(worker(jobs, found), server.url) as app:
        server.revoke("INSERT", "relay")
        await app.schedule(jobs(1), timedelta(0))
        await until(lambda: "the outbox cannot be sent, trying again in 1 s: E506" in caplog.text)
        server.grant("INSERT", "relay")
        await until(lambda: found)
        assert not app._ended.done()


async def test_tries_of_suspects_are_counted_when_the_server_takes_it_again(server, jobs, caplog):
    found = []
    async with App(worker(jobs, []), server.url):
        pass  # declares the queue
    async with App(Service("sender"), server.url) as sender:
        await sender.send(jobs(1))
    server.execute("UPDATE @message SET suspect = true")
    server.revoke("INSERT", "attempt")
    async with App(worker(jobs, found), server.url) as app:
        await until(lambda: "again in 1 s: E506" in caplog.text)
        assert not found
        server.grant("INSERT", "attempt")
        await until(lambda: found)
        assert not app._ended.done()


async def test_parked_messages_are_taken_when_the_server_takes_it_again(server, jobs, caplog):
    service, seen = Service("worker"), []

    @service.handle(retry=Retry(immediate=0, delays_s=(0.5,), jitter=0))
    async def work(_message: jobs, ctx: Context) -> None:
        seen.append(ctx.attempt)
        if ctx.attempt == 0:
            server.revoke("UPDATE", "parked")
            raise ConnectionError("away")

    async with App(service, server.url) as app:
        await app.send(jobs(1))
        await until(lambda: "cannot be read: E506" in caplog.text)
        server.grant("UPDATE", "parked")
        await until(lambda: 1 in seen)
        assert not app._ended.done()


async def test_keys_that_could_not_be_read_anew_are_read_later(server, entries, caplog):
    found = []
    async with App(worker(entries, found), server.url) as app:
        await app.publish(entries("a"))
        await until(lambda: found)
        server.revoke("SELECT", "dead_letter")
        parking = app._consumers[0].parking
        parking.keys["a key that another process has treated"] = 1
        parking.notify()
        await until(lambda: "cannot be read: E506" in caplog.text)
        server.grant("SELECT", "dead_letter")
        await until(lambda: not parking.keys)
        assert not app._ended.done()


async def test_what_a_publisher_is_told_says_that_nothing_is_wrong_with_the_message(server, jobs):
    async with App(worker(jobs, []), server.url) as app:
        server.revoke("INSERT", "message")
        with pytest.raises(StoreLostError, match=r"E506 .* refused a statement: permission denied for table message"):
            await app.send(jobs(1))
        server.grant("INSERT", "message")
        server.trip("@message", "53100")
        with pytest.raises(StoreFullError):
            await app.send(jobs(1))
        server.untrip()
        await app.send(jobs(2))


async def test_what_a_service_s_own_schema_meets_is_said_with_its_name(server):
    service = Service("worker")
    service.schema("CREATE TABLE effect (")
    with pytest.raises(
        DefinitionError, match=r"E121 .*'worker' is refused: PostgresSyntaxError: syntax error"
    ) as caught:
        await App(service, server.url).start()
    assert isinstance(caught.value.__cause__, asyncpg.PostgresSyntaxError)
