"""A broker that runs full under load: it says so, what it has confirmed is handled once, and all goes on with room."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import apsw
import nats
import pytest

from tests import brokers
from trunkline import App, Context, Queue, Service, Struct, System
from trunkline.errors import StoreFullError, TransportError
from trunkline.testing.proxy import Proxy
from trunkline.transport import parse_address

pytestmark = pytest.mark.timeout(240)
BACKLOG = 300
ROOT = Path(__file__).parents[2]


jobs, done = Queue("jobs"), Queue("done")


@jobs.command
class Job(Struct):
    number: int


@done.command
class Done(Struct):
    number: int


class Shop:
    """Two services: `worker` notes each Job and answers with Done, `books` notes those once its gate is open."""

    def __init__(self, gate=None) -> None:
        self.gate = gate or asyncio.Event()
        self.worker, self.books = Service("worker"), Service("books")
        self.system = System("shop", [self.worker, self.books])
        for service in self.system.services:
            service.schema("CREATE TABLE IF NOT EXISTS effect (service TEXT, number INTEGER)")

        @self.worker.handle
        async def work(job: Job, ctx: Context) -> Done:
            await self.note(ctx, "worker", job.number)
            return Done(job.number)

        @self.books.handle
        async def close(done: Done, ctx: Context) -> None:
            await self.gate.wait()
            await self.note(ctx, "books", done.number)

    async def note(self, ctx, service, number):
        transaction = await ctx.transaction()
        await transaction.execute("INSERT INTO effect VALUES (?, ?)", (service, number))


def effects(folder, service):
    """Return what a service has noted, of a reader of its own."""
    connection = apsw.Connection(str(folder / "shop.db"), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(5000)
    rows = connection.execute("SELECT number FROM effect WHERE service = ? ORDER BY number", (service,)).fetchall()
    connection.close()
    return [number for (number,) in rows]


def at_least(folder, service, count):
    found = effects(folder, service)
    return found if len(found) >= count else None


async def until(condition, within_s=60):
    async with asyncio.timeout(within_s):
        while not (found := condition()):
            await asyncio.sleep(0.05)
    return found


class Publishing:
    """Publishes Jobs one after the other until it is told to stop, each again under its id until it is confirmed."""

    def __init__(self, app):
        self.app = app
        self.confirmed = []
        self.refused = []
        self.stopping = False

    async def go_on(self):
        number = BACKLOG
        while not self.stopping:
            number += 1
            await self.publish(number)

    async def publish(self, number):
        identity = str(uuid.uuid4())
        while True:
            try:
                await self.app.publish(Job(number), id=identity)
            except TransportError as error:
                self.refused.append(error)
            else:
                self.confirmed.append(number)
                return


def control(name, *arguments):
    """Run rabbitmqctl as the server runs."""
    environment = Path(f"/proc/{brokers.record(name)['pid']}/environ").read_text().split("\0")
    known = dict(entry.split("=", 1) for entry in environment if "=" in entry)
    # Debian's command on PATH wants to be root; this is the script beneath it.
    command = shutil.which("rabbitmqctl", path=f"/usr/lib/rabbitmq/bin:{os.environ['PATH']}")
    subprocess.run([command, *arguments], env=known, check=True, capture_output=True, timeout=60)


@pytest.mark.xdist_group("rabbitmq")
async def test_a_disk_alarm_of_rabbitmq_in_the_middle(tmp_path):
    name = "rabbitmq@alarm"
    shop = Shop()
    url = f"{brokers.broker_url(name)}?prefix=t{uuid.uuid4()}&timeout_s=5"
    async with App(shop.system, url, store=f"sqlite:///{tmp_path}/shop.db") as app:
        for number in range(1, BACKLOG + 1):
            await app.publish(Job(number))
        publishing = Publishing(app)
        task = asyncio.create_task(publishing.go_on())
        await until(lambda: len(publishing.confirmed) > BACKLOG)
        try:
            await asyncio.to_thread(control, name, "set_disk_free_limit", "900000GB")
            await until(lambda: len(publishing.refused) >= 2)
            said = str(publishing.refused[-1])
            before = len(publishing.confirmed)
            shop.gate.set()  # what is in its queues is still handed out and acknowledged
            handled = await until(lambda: at_least(tmp_path, "books", BACKLOG))
            assert len(publishing.confirmed) == before
        finally:
            await asyncio.to_thread(control, name, "set_disk_free_limit", "50MB")
        await until(lambda: len(publishing.confirmed) >= before + BACKLOG)
        publishing.stopping = True
        await task
        expected = sorted([*range(1, BACKLOG + 1), *publishing.confirmed])
        await until(lambda: at_least(tmp_path, "books", len(expected)))
        assert effects(tmp_path, "worker") == effects(tmp_path, "books") == expected
        assert "E521" in said
        assert "disk" in said
        assert len(handled) >= BACKLOG
    brokers.stop(name)


async def until_full(app):
    """Publish Done until its queue takes no more; return the numbers that were taken, and why not the next."""
    for number in range(10_000, 20_000):
        try:
            await app.publish(Done(number))
        except StoreFullError as error:
            return range(10_000, number), str(error)
    pytest.fail("the queue is never full")


@pytest.mark.xdist_group("rabbitmq")
async def test_a_queue_of_rabbitmq_at_its_limit(tmp_path):
    shop = Shop()
    prefix = f"t{uuid.uuid4()}"
    url = f"{brokers.broker_url('rabbitmq')}?prefix={prefix}"
    limit = '{"max-length": 20, "overflow": "reject-publish"}'
    arguments = ("--apply-to", "queues", prefix, rf"^{prefix}\.done$", limit)
    async with App(shop.system, url, store=f"sqlite:///{tmp_path}/shop.db") as app:
        await asyncio.to_thread(control, "rabbitmq", "set_policy", *arguments)
        try:
            done, said = await until_full(app)
            # Nothing takes from `done`; the worker goes on all the same, and what it publishes waits.
            for number in range(1, BACKLOG + 1):
                await app.publish(Job(number))
            await until(lambda: at_least(tmp_path, "worker", BACKLOG))
            shop.gate.set()
            expected = [*range(1, BACKLOG + 1), *done]
            await until(lambda: at_least(tmp_path, "books", len(expected)))
            assert "E502" in said
            assert "for queue 'done': its queue is full" in said
            assert effects(tmp_path, "worker") == expected[:BACKLOG]
            assert effects(tmp_path, "books") == expected
        finally:
            await asyncio.to_thread(control, "rabbitmq", "clear_policy", prefix)


@pytest.mark.xdist_group("nats")
async def test_a_queue_of_nats_at_its_limit_while_connections_break(tmp_path):
    shop = Shop()
    server = brokers.broker_url("nats")
    prefix = f"t{uuid.uuid4().hex}"
    (host, port), *_ = parse_address(server).hosts
    async with Proxy(host, port) as proxy:
        url = f"{proxy.url(server)}?prefix={prefix}&timeout_s=5"
        async with App(shop.system, url, store=f"sqlite:///{tmp_path}/shop.db") as app:
            client = await nats.connect(server)
            stream = client.jetstream()
            streams = [info.config for info in await stream.streams_info()]
            name = next(config.name for config in streams if f"{prefix}.q.done" in config.subjects)
            limited = (await stream.stream_info(name)).config
            limited.max_bytes = 20_000
            await stream.update_stream(limited)
            publishing = Publishing(app)
            task = asyncio.create_task(publishing.go_on())
            # Nothing takes from `done`, so it is full soon; the worker goes on, and what it publishes waits.
            await until(lambda: at_least(tmp_path, "worker", BACKLOG))
            with pytest.raises(StoreFullError, match=r"E502 .*maximum bytes"):
                await app.publish(Done(0))
            for _ in range(3):
                proxy.reset()
                goal = len(publishing.confirmed) + 50
                await until(lambda goal=goal: len(publishing.confirmed) > goal)
            publishing.stopping = True
            await task
            shop.gate.set()
            await until(lambda: at_least(tmp_path, "books", len(publishing.confirmed)))
            assert effects(tmp_path, "worker") == effects(tmp_path, "books") == publishing.confirmed
            async with asyncio.timeout(30):
                while (await stream.stream_info(name)).state.messages:  # acknowledged after the commit
                    await asyncio.sleep(0.05)
            await client.close()


# --- several processes ---

SHOP = """
import asyncio
from pathlib import Path

from tests.transports.test_full_brokers import Shop


class Gate:
    async def wait(self):
        while not Path("open").exists():
            await asyncio.sleep(0.05)


shop = Shop(Gate())
system = shop.system
"""


@contextlib.asynccontextmanager
async def limited_by_policy(server, prefix):
    """Give the queue `done` of a RabbitMQ a limit."""
    limit = '{"max-length": 20, "overflow": "reject-publish"}'
    await asyncio.to_thread(
        control, "rabbitmq", "set_policy", "--apply-to", "queues", prefix, rf"^{prefix}\.done$", limit
    )
    try:
        yield
    finally:
        await asyncio.to_thread(control, "rabbitmq", "clear_policy", prefix)


@contextlib.asynccontextmanager
async def limited_by_stream(server, prefix):
    """Give the queue `done` of a NATS server a limit."""
    client = await nats.connect(server)
    stream = client.jetstream()
    limited = next(info.config for info in await stream.streams_info() if f"{prefix}.q.done" in info.config.subjects)
    limited.max_bytes = 20_000
    await stream.update_stream(limited)
    yield
    await client.close()


@pytest.mark.parametrize(
    ("name", "limited"),
    [
        pytest.param("rabbitmq", limited_by_policy, marks=pytest.mark.xdist_group("rabbitmq")),
        pytest.param("nats", limited_by_stream, marks=pytest.mark.xdist_group("nats")),
    ],
)
async def test_a_process_is_killed_while_the_queue_that_it_and_another_send_to_is_full(name, limited, tmp_path):
    (tmp_path / "shop.py").write_text(SHOP)
    server, prefix = brokers.broker_url(name), f"t{uuid.uuid4().hex}"
    url = f"{server}?prefix={prefix}&timeout_s=5{'&lease_s=2' if name == 'nats' else ''}"
    async with contextlib.AsyncExitStack() as stack:
        logs = [tmp_path / name for name in ("first.log", "second.log")]
        processes = {log: stack.enter_context(running(tmp_path, url, log)) for log in logs}
        await until(lambda: len(saying("runs on", logs)) == len(logs))
        await stack.enter_async_context(limited(server, prefix))
        outside = await stack.enter_async_context(App(Service("outside"), url, store="none:"))
        done, _ = await until_full(outside)
        for number in range(BACKLOG):
            await outside.publish(Job(number))
        await until(lambda: at_least(tmp_path, "worker", BACKLOG))
        # That process has taken what waits to be sent, or some of it.
        sender, *_ = await until(lambda: saying("the outbox waits with done", logs))
        processes.pop(sender).kill()
        for number in range(BACKLOG, 2 * BACKLOG):
            await outside.publish(Job(number))
        await until(lambda: at_least(tmp_path, "worker", 2 * BACKLOG))
        assert not effects(tmp_path, "books")
        (tmp_path / "open").touch()
        expected = [*range(2 * BACKLOG), *done]
        await until(lambda: at_least(tmp_path, "books", len(expected)))
        (left,) = processes.values()
        assert left.poll() is None
    assert effects(tmp_path, "worker") == expected[: 2 * BACKLOG]
    assert effects(tmp_path, "books") == expected


def saying(words, logs):
    return [log for log in logs if words in log.read_text()]


@contextlib.contextmanager
def running(folder, url, log):
    """Run the shop of `folder` in a process of its own."""
    command = [sys.executable, "-m", "trunkline.cli", "run", "shop:system"]
    with log.open("wb") as told:
        process = subprocess.Popen(
            [*command, "--transport", url, "--store", f"sqlite:///{folder}/shop.db"],
            cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=told, stderr=told,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)
