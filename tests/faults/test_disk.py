"""A disk that is full or fails to sync: the publish is refused, nothing confirmed is lost, nothing invented."""

import asyncio
from pathlib import Path

import apsw
import pytest

from tests.faults import file
from tests.unit.rig import until
from trunkline import App, Context, Service, Stream, Struct
from trunkline.errors import FatalStoreError, StoreFullError

orders = Stream("disk-orders", key="key")


@orders.event
class DiskOrder(Struct):
    key: str
    number: int


class FailingVFS(apsw.VFS):
    """The machine's file system, failing on command: `full` refuses writes, `sync` fails syncs, at the n-th call."""

    def __init__(self) -> None:
        self.name = "failing"
        self.fail: str | None = None
        self.after = 0
        self.failed = 0
        super().__init__(self.name, "")

    def xOpen(self, name, flags):  # noqa: N802 - the name SQLite gives it
        return FailingFile(self, name, flags)

    def strikes(self, kind: str) -> bool:
        if self.fail != kind:
            return False
        self.after -= 1
        if self.after >= 0:
            return False
        self.failed += 1
        return True


class FailingFile(apsw.VFSFile):
    def __init__(self, vfs, name, flags) -> None:
        self._vfs = vfs
        super().__init__("", name, flags)

    def xWrite(self, data, offset):  # noqa: N802 - the name SQLite gives it
        if self._vfs.strikes("full"):
            raise apsw.FullError("no space left on device")
        super().xWrite(data, offset)

    def xSync(self, flags):  # noqa: N802 - the name SQLite gives it
        if self._vfs.strikes("sync"):
            raise apsw.IOError("the disk did not sync")
        super().xSync(flags)


@pytest.fixture
def vfs():
    failing = FailingVFS()
    yield failing
    failing.fail = None
    failing.unregister()


def a_service() -> Service:
    service = Service("disk")
    service.schema("CREATE TABLE IF NOT EXISTS effect (n INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT, number INTEGER)")

    @service.handle
    async def note(order: DiskOrder, ctx: Context) -> None:
        tx = await ctx.transaction()
        await tx.execute("INSERT INTO effect (key, number) VALUES (?, ?)", (order.key, order.number))

    return service


def stored(path: Path) -> list[int]:
    found = file.rows(path, "SELECT event FROM trunkline_log ORDER BY place")
    return [int(bytes(event).split(b'"number":')[1].split(b"}")[0]) for (event,) in found]


@pytest.mark.parametrize("after", [0, 1, 2, 3, 5, 8])
async def test_a_full_disk_refuses_the_publish_and_heals(tmp_path, vfs, after):
    path = tmp_path / "disk.db"
    confirmed, refused = [], []
    async with App(Service("disk-publisher"), f"sqlite:///{path}?vfs=failing") as app:
        for number in range(30):
            if number == 10:
                vfs.fail, vfs.after = "full", after
            if number == 20:
                vfs.fail = None
            try:
                await app.publish(DiskOrder("a", number))
                confirmed.append(number)
            except StoreFullError:
                refused.append(number)
    assert vfs.failed
    assert refused
    assert set(refused) <= set(range(10, 20))
    assert stored(path) == confirmed, "what was refused is not there, what was confirmed is"
    assert file.is_sound(path)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
async def test_a_failed_sync_is_fatal_and_never_lies(tmp_path, vfs, after):
    path = tmp_path / "disk.db"
    confirmed, unknown = [], []
    app = App(Service("disk-publisher"), f"sqlite:///{path}?vfs=failing")
    await app.start()
    for number in range(20):
        if number == 10:
            vfs.fail, vfs.after = "sync", after
        try:
            await app.publish(DiskOrder("a", number))
            confirmed.append(number)
        except FatalStoreError:
            unknown.append(number)
    assert unknown == list(range(unknown[0], 20)), "after the first failure nothing is confirmed any more"
    with pytest.raises(FatalStoreError):
        await app.ended()
    vfs.fail = None
    await app.stop()
    # A failed sync leaves its own message unknown; every later one was refused, every confirmed one is there.
    assert stored(path) in (confirmed, [*confirmed, unknown[0]])
    assert file.is_sound(path)


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_file_that_is_deleted_or_replaced_ends_the_process(tmp_path, replaced):
    path = tmp_path / "disk.db"
    app = App(Service("disk-publisher"), f"sqlite:///{path}")
    await app.start()
    await app.publish(DiskOrder("a", 1))
    if replaced:
        (tmp_path / "backup.db").write_bytes(path.read_bytes())
        (tmp_path / "backup.db").replace(path)
    else:
        path.unlink()
    with pytest.raises(FatalStoreError, match="was deleted or replaced under process"):
        await app.ended()
    with pytest.raises(FatalStoreError, match="E515"):
        await app.publish(DiskOrder("a", 2))
    await app.stop()


async def test_a_transaction_that_is_open_when_the_file_goes_fails_with_it(tmp_path):
    path, held, free, facts = tmp_path / "disk.db", asyncio.Event(), asyncio.Event(), []
    service = Service("disk")
    service.schema("CREATE TABLE IF NOT EXISTS effect (key TEXT, number INTEGER)")

    @service.handle
    async def note(order: DiskOrder, ctx: Context) -> None:
        tx = await ctx.transaction()
        await tx.execute("INSERT INTO effect VALUES (?, ?)", (order.key, order.number))
        held.set()
        await free.wait()

    app = App(service, f"sqlite:///{path}", grace_s=0.1)
    app.hooks.add(facts.append)
    await app.start()
    engine, (consumer,) = app.transport.engine, app._consumers
    settled, errors = consumer.settled, []
    consumer.deliverer._settled = lambda unit, error: (errors.append(error), settled(unit, error))
    await app.publish(DiskOrder("a", 1))
    await held.wait()
    path.unlink()
    with pytest.raises(FatalStoreError, match="E515"):
        await app.ended()
    free.set()
    await until(lambda: errors)
    assert [error.code for error in errors] == ["E515"]
    assert facts == []
    assert engine._phase == "failed"
    await app.stop()


async def test_a_service_whose_disk_was_full_goes_on_once_and_in_order(tmp_path, vfs):
    path = tmp_path / "disk.db"
    confirmed = []
    async with App(a_service(), f"sqlite:///{path}?vfs=failing") as app:
        for number in range(60):
            if number % 20 == 10:
                vfs.fail, vfs.after = "full", number % 7
            if number % 20 == 15:
                vfs.fail = None
            try:
                await app.publish(DiskOrder("ab"[number % 2], number))
                confirmed.append(number)
            except StoreFullError:
                continue
        vfs.fail = None
        async with asyncio.timeout(30):
            while len(file.rows(path, "SELECT n FROM effect")) < len(confirmed):
                await asyncio.sleep(0.02)
        assert await app.store.dead_letters() == []
    effects = file.rows(path, "SELECT key, number FROM effect ORDER BY n")
    for key in "ab":
        assert [n for k, n in effects if k == key] == [n for n in confirmed if "ab"[n % 2] == key]
    assert vfs.failed
    assert file.is_sound(path)
