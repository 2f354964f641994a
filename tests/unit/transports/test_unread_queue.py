"""A Queue whose owner has never run keeps what is sent to it."""

import asyncio

from trunkline import App, Context, Queue, Service, Struct
from trunkline.engine import query

requests = Queue("unread-requests")
jobs = Queue("unread-jobs")


@requests.command
class Ask(Struct):
    number: int


@jobs.command
class Work(Struct):
    number: int


WORK = "SELECT count(*) FROM trunkline_queue WHERE instr(event, CAST('work' AS BLOB))"

asker = Service("asker")


@asker.handle
async def pass_on(ask: Ask) -> Work:
    return Work(ask.number)


@asker.background
async def directly(running) -> None:
    async with running.unit_of_work() as ctx:
        ctx.send(Work(2))


async def test_a_queue_keeps_what_is_sent_before_its_owner_ever_ran(tmp_path):
    url = f"sqlite:///{tmp_path}/jobs.db"
    owner, done = Service("owner"), []

    @owner.handle
    async def work(job: Work, ctx: Context) -> None:
        done.append(job.number)

    async with App(asker, url) as app:
        await app.send(Ask(1))
        await app.send(Work(3))
        async with asyncio.timeout(10):
            while query(app.transport.engine.reader, WORK) != [(3,)]:
                await asyncio.sleep(0.01)
    async with App(owner, url):
        async with asyncio.timeout(10):
            while len(done) < 3:
                await asyncio.sleep(0.01)
    assert sorted(done) == [1, 2, 3]
