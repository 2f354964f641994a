import asyncio
import contextlib
import multiprocessing
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import apsw
import pytest

from tests.unit.testing.simulator.acting import Acting, seen
from trunkline.errors import SimulationError
from trunkline.testing.simulator import Tape
from trunkline.testing.simulator.loop import LANE

HERE = Path(__file__).name


async def connect():
    await asyncio.open_connection("127.0.0.1", 1)


async def execute():
    await asyncio.create_subprocess_exec("true")


REFUSED = {
    "socket.__new__()": lambda: socket.socket(),
    "socket.getaddrinfo('localhost', 80)": lambda: socket.create_connection(("localhost", 80)),
    "socket.gethostbyname('localhost')": lambda: socket.gethostbyname("localhost"),
    "urllib.Request('http://localhost:1', 'GET')": lambda: urllib.request.urlopen("http://localhost:1"),
    "create_connection": connect,
    "open('never.txt', 'w')": lambda: open("never.txt", "w"),
    "open('never.txt', ": lambda: os.open("never.txt", os.O_CREAT),
    "open(": lambda: tempfile.TemporaryFile(),
    "os.mkdir('never', 511": lambda: Path("never").mkdir(),
    "os.remove('never'": lambda: os.remove("never"),
    "os.rename('never', 'nowhere')": lambda: os.rename("never", "nowhere"),
    "sqlite3.connect('never.db')": lambda: sqlite3.connect("never.db"),
    "apsw.Connection(": lambda: apsw.Connection("never.db", flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE),
    "subprocess.Popen('true'": lambda: subprocess.run(["true"], check=False),
    "subprocess_exec": execute,
    "os.system(b'true')": lambda: os.system("true"),
    "os.fork()": lambda: os.fork(),
    "os.posix_spawn('/bin/true'": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "os.fork() ": lambda: multiprocessing.get_context("fork").Process(target=print).start(),
    "multiprocessing.Process.start": lambda: multiprocessing.get_context("spawn").Process(target=print).start(),
    "threading.Thread.start": lambda: threading.Thread(target=print).start(),
    "threading.Thread.start ": lambda: ThreadPoolExecutor().submit(print),
    "time.sleep(3) on the event loop": lambda: time.sleep(3),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_leaves_the_simulation_ends_the_run_though_the_handler_swallows_it(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    async def swallows():
        with contextlib.suppress(Exception):
            result = REFUSED[what]()
            if asyncio.iscoroutine(result):
                await result

    acting = Acting(swallows)
    with pytest.raises(SimulationError) as caught:
        acting.run()

    assert caught.value.code == "E702"
    assert caught.value.message.startswith(f"actor calls {what.strip()}")
    assert f"{HERE}:" in caught.value.message
    assert caught.value.hint
    made = {"never.db"} if what.startswith("apsw") else set()  # SQLite makes an empty file before it can be refused
    assert {path.name for path in tmp_path.iterdir()} == made
    assert Acting(lambda: None).run().violations == []


def test_files_may_be_read_and_a_database_in_memory_be_used():
    def reads():
        with sqlite3.connect(":memory:") as database:
            (row,) = database.execute("SELECT 1")
        database.close()
        with open(os.devnull, "w") as nowhere:
            nowhere.write("x")
        return Path(__file__).read_text()[:6], row

    assert seen(reads) == ("import", (1,))


def test_a_module_imported_in_a_run_writes_no_bytecode(tmp_path, monkeypatch):
    (tmp_path / "imported_late.py").write_text("found = 1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)

    def imports():
        import imported_late

        return imported_late.found

    assert seen(imports) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["imported_late.py"]


def test_to_thread_is_a_step_of_the_simulation():
    assert seen(lambda: asyncio.to_thread(threading.get_ident)) == threading.get_ident()


def test_what_a_crashed_process_left_behind_touches_nothing_when_it_is_closed(tmp_path, caplog):
    left = tmp_path / "left"
    steps = []

    async def waits():
        steps.append(LANE.get().steps)
        if len(steps) == 2:
            try:
                await asyncio.sleep(100)
            finally:
                steps.append("closed")
                left.write_text("a crash has no finally")

    acting = Acting(waits)
    assert acting.run().violations == []
    crashed = acting.run(tape=Tape({"crash actor": {0: steps[0] + 1}}))

    assert crashed.fired == {"crash": 1}
    assert crashed.violations == []
    assert steps[-1] == "closed"
    assert not left.exists()
    assert caplog.text == ""


def test_outside_of_a_run_nothing_is_refused(tmp_path):
    seen(lambda: None)

    (tmp_path / "file").write_text("x")
    socket.socket().close()
    subprocess.run(["true"], check=True)
    thread = threading.Thread(target=list)
    thread.start()
    thread.join()
    time.sleep(0)
    apsw.Connection(str(tmp_path / "real.db")).close()
