"""Poison: what cannot be handled is set aside with its reason, and the rest goes on."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import apsw
import msgspec
import pytest

from tests.faults import file
from tests.faults.poisoned import Job, Order, jobs, orders, worker
from tests.faults.processes import ROOT, until
from tests.unit.rig import holds
from trunkline import App, Message, Queue, Service, Struct
from trunkline.message import pack, unpack
from trunkline.store import DeadLetterRow
from trunkline.stores.sqlite import read_dead_letters

publisher = Service("poison-publisher")


class Restarted:
    """The service in a process that is started again whenever it dies, as a supervisor does."""

    def __init__(self, path: Path) -> None:
        self.deaths = 0
        self._path = path
        self._stopping = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stopping = True
        if self._process is not None:
            self._process.terminate()
        self._thread.join()

    def _keep(self):
        while not self._stopping:
            command = [sys.executable, "-m", "tests.faults.poisoned", str(self._path)]
            self._process = subprocess.Popen(command, cwd=ROOT)
            if self._stopping:
                self._process.terminate()
            if self._process.wait() == -9:
                self.deaths += 1


def dead(path: Path) -> list[DeadLetterRow]:
    with file.opened(path) as connection:
        return read_dead_letters(connection)


def numbers(path: Path, key: str) -> list[int]:
    return [row[0] for row in file.rows(path, "SELECT number FROM effect WHERE key = ? ORDER BY n", key)]


@pytest.mark.timeout(180)
async def test_a_message_that_kills_its_process_is_set_aside_and_the_others_are_handled(tmp_path):
    path = tmp_path / "poison.db"
    async with App(worker, f"sqlite:///{path}"):
        pass  # declares the reader, so that nothing is missed
    async with App(publisher, f"sqlite:///{path}") as app:
        for number in range(20):
            await app.publish(Order("calm", number))
            if number == 10:
                await app.publish(Order("deadly", 0, deadly=True))
            await app.publish(Order("deadly", number + 1))
    with Restarted(path) as process:
        await asyncio.to_thread(until, lambda: dead(path), "the deadly message is set aside", 90)
        await asyncio.to_thread(until, lambda: len(numbers(path, "calm")) == 20, "the calm ones are handled", 30)
        assert numbers(path, "calm") == list(range(20))
        assert numbers(path, "deadly") == list(range(1, 11)), "its successors wait, those before it were handled"
        (row,) = dead(path)
        assert (row.code, row.key, row.holds) == ("crashed", "deadly", True)
        assert "died" in row.reason
        assert process.deaths >= 3
        # Corrected and sent again: it is done, and what waited behind it follows in order.
        harmless = msgspec.structs.replace(unpack(row.raw), data=b'{"key":"deadly","number":100}')
        async with App(publisher, f"sqlite:///{path}") as app:
            await app.store.redrive(row.number, pack(harmless))
        await asyncio.to_thread(until, lambda: len(numbers(path, "deadly")) == 21, "its key goes on", 30)
        assert numbers(path, "deadly") == [*range(1, 11), 100, *range(11, 21)]
    assert dead(path) == []


def spoil(path: Path, table: str, event: bytes) -> None:
    """Replace the newest envelope of a table, as a broken producer would have written it."""
    connection = apsw.Connection(str(path))
    connection.set_busy_timeout(5000)
    connection.execute(f"UPDATE {table} SET event = ? WHERE rowid = (SELECT max(rowid) FROM {table})", (event,))
    connection.close()


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (b"\x00\xff no envelope", "E400"),
        (pack(Message("id-1", "job", "elsewhere", b"{broken", 0.0)), "E412"),
        (pack(Message("id-2", "job", "elsewhere", b'{"number":"three"}', 0.0)), "E412"),
        (pack(Message("id-3", "nobody.knows.it", "elsewhere", b"{}", 0.0)), "E415"),
    ],
    ids=["bytes", "json", "type", "unknown"],
)
async def test_what_cannot_be_read_is_kept_with_its_bytes_corrected_and_done(tmp_path, event, code):
    path = tmp_path / "poison.db"
    async with App(publisher, f"sqlite:///{path}") as app:
        await app.send(Job(1), to=jobs)
        await app.send(Job(0), to=jobs)
    spoil(path, "trunkline_queue", event)
    async with App(worker, f"sqlite:///{path}") as app:
        await until_async(app.store.dead_letters)
        await until_async(lambda: numbers(path, "job") == [1])
        (row,) = await app.store.dead_letters()
        assert (row.code, row.raw, row.holds) == (code, event, False)
        await app.store.redrive(row.number, pack(Message("id-4", "job", "operator", b'{"number":2}', 0.0)))
        await until_async(lambda: numbers(path, "job") == [1, 2])
        assert await app.store.dead_letters() == []


FOREIGN = b'{"specversion":"1.0","id":"1","type":"foreign.number","source":"s","data":{"number":7}}'


@pytest.mark.parametrize("event", [b'{"number":7}', FOREIGN], ids=["plain", "event"])
async def test_what_another_program_sent_is_read_when_it_is_redriven_to_a_reader_that_can(tmp_path, event):
    path = tmp_path / "poison.db"
    strict, lenient = Queue("foreign"), Queue("foreign", plain="foreign.number")
    blind, reader, seen = Service("foreign"), Service("foreign"), []

    @blind.handle(from_=strict)
    async def take(message: Message) -> None: ...

    @lenient.command(type="foreign.number")
    class Number(Struct):
        number: int

    @reader.handle
    async def read(message: Number) -> None:
        seen.append(message.number)

    async with App(publisher, f"sqlite:///{path}") as app:
        await app.send(Message("id-2", "x", "s", b"{}", 0.0), to=strict)
    spoil(path, "trunkline_queue", event)
    async with App(blind, f"sqlite:///{path}") as app:
        await until_async(app.store.dead_letters)
        (row,) = await app.store.dead_letters()
        assert (row.code, row.raw) == ("E400", event)
    async with App(reader, f"sqlite:///{path}") as app:
        await app.store.redrive(row.number)
        await until_async(lambda: seen == [7])
        assert await app.store.dead_letters() == []


async def test_a_handler_that_always_fails_holds_its_key_until_its_letter_is_discarded(tmp_path):
    path = tmp_path / "poison.db"
    async with App(worker, f"sqlite:///{path}") as app:
        await app.publish(Order("a", 1, bad=True), to=orders)
        for number in range(2, 6):
            await app.publish(Order("a", number))
            await app.publish(Order("b", number))
        await until_async(app.store.dead_letters)
        await until_async(lambda: len(numbers(path, "b")) == 4)
        (row,) = await app.store.dead_letters()
        assert (row.code, row.attempt, row.message_type) == ("handler", 2, "order")
        assert "order 1 is bad" in row.reason
        assert "Traceback" in row.detail
        assert numbers(path, "a") == []
        await app.store.discard_dead_letter(row.number)
        await until_async(lambda: len(numbers(path, "a")) == 4)
        assert numbers(path, "a") == [2, 3, 4, 5]


async def until_async(condition) -> None:
    async with asyncio.timeout(20):
        while not await holds(condition):
            await asyncio.sleep(0.01)
