import asyncio
import dataclasses
import datetime as dt
import os
import random
import secrets
import subprocess
import sys
import threading
import time
import timeit
import uuid
from datetime import UTC
from datetime import datetime as imported_class
from time import monotonic as imported_monotonic
from time import time as imported_time

import pytest

from tests.unit.testing.simulator.acting import Acting, seen
from trunkline.errors import SimulationError
from trunkline.testing.simulator import Tape, World
from trunkline.testing.simulator.interception import interception
from trunkline.testing.simulator.world import EPOCH

imported_now = imported_class.now


@dataclasses.dataclass
class Stamped:
    at: dt.datetime = dataclasses.field(default_factory=dt.datetime.utcnow)
    seconds: float = dataclasses.field(default_factory=time.time)


WALL = {
    "time.time": lambda: time.time(),
    "time.time_ns": lambda: time.time_ns() / 1e9,
    "clock_gettime": lambda: time.clock_gettime(time.CLOCK_REALTIME),
    "clock_gettime_ns": lambda: time.clock_gettime_ns(time.CLOCK_REALTIME) / 1e9,
    "a name imported before": lambda: imported_time(),
    "a default factory": lambda: Stamped().seconds,
    "a default factory of datetime": lambda: Stamped().at.replace(tzinfo=UTC).timestamp(),
    "datetime.now": lambda: dt.datetime.now().timestamp(),
    "datetime.now(tz)": lambda: dt.datetime.now(tz=UTC).timestamp(),
    "datetime.utcnow": lambda: dt.datetime.utcnow().replace(tzinfo=UTC).timestamp(),
    "datetime.today": lambda: dt.datetime.today().timestamp(),
    "datetime.now bound before": lambda: imported_now(UTC).timestamp(),
    "localtime": lambda: time.mktime(time.localtime()),
    "gmtime(None)": lambda: time.mktime(time.gmtime(None)) - time.timezone,
    "ctime": lambda: time.mktime(time.strptime(time.ctime())),
    "asctime": lambda: time.mktime(time.strptime(time.asctime())),
    "strftime": lambda: time.mktime(time.strptime(time.strftime("%Y-%m-%d %H:%M:%S"), "%Y-%m-%d %H:%M:%S")),
    "date.today": lambda: time.mktime(dt.date.today().timetuple()) + 80_000,
}


@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
@pytest.mark.parametrize("name", WALL)
def test_user_code_sees_virtual_wall_time(name):
    tolerance_s = 90_000 if name == "date.today" else 1.0

    assert seen(WALL[name]) == pytest.approx(EPOCH, abs=tolerance_s)
    assert WALL[name]() > EPOCH + 10_000_000


SEARCH = """
from datetime import UTC, datetime
now = datetime.now
from tests.unit.testing.simulator.acting import Acting
from trunkline.testing.simulator.search import random_runs, runs
acting = Acting(lambda: now(UTC).timestamp())
list(runs(acting.simulation, random_runs([1])))
print(acting.given[0])
"""


def test_what_was_bound_before_is_replaced_where_a_search_is_the_first_to_run():
    done = subprocess.run([sys.executable, "-c", SEARCH], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(EPOCH, abs=10_000)  # its clock may be wrong


MONOTONIC = {
    "monotonic": lambda: time.monotonic(),
    "monotonic_ns": lambda: time.monotonic_ns() / 1e9,
    "perf_counter": lambda: time.perf_counter(),
    "perf_counter_ns": lambda: time.perf_counter_ns() / 1e9,
    "process_time": lambda: time.process_time(),
    "process_time_ns": lambda: time.process_time_ns() / 1e9,
    "thread_time": lambda: time.thread_time(),
    "thread_time_ns": lambda: time.thread_time_ns() / 1e9,
    "clock_gettime": lambda: time.clock_gettime(time.CLOCK_MONOTONIC),
    "a name imported before": lambda: imported_monotonic(),
}


@pytest.mark.parametrize("name", MONOTONIC)
def test_user_code_sees_virtual_time_on_monotonic_clocks(name):
    async def waits():
        before = MONOTONIC[name]()
        await asyncio.sleep(30)
        return MONOTONIC[name]() - before

    assert seen(waits) == pytest.approx(30.0, abs=0.001)


def test_the_skew_of_a_process_shows_in_what_its_code_sees():
    acting = Acting(time.time)

    result = acting.run(tape=Tape({"clock_skew": {0: 1}, "clock_skew how": {0: 1}}))

    assert result.fired == {"clock_skew": 1}
    assert acting.given[0] == pytest.approx(EPOCH + 30, abs=1)


def test_subclasses_of_datetime_get_their_own_type():
    class Mine(dt.datetime):
        pass

    assert type(seen(lambda: Mine.now())) is Mine
    assert isinstance(seen(lambda: dt.datetime.now()), dt.datetime)


def test_a_wrong_argument_is_refused_as_ever():
    def wrong():
        with pytest.raises(TypeError):
            time.time(1)
        with pytest.raises(TypeError):
            dt.datetime.now("UTC")
        with pytest.raises(TypeError):
            os.urandom("x")
        return True

    assert seen(wrong)


DRAWS = {
    "uuid1": lambda: str(uuid.uuid1()),
    "uuid4": lambda: str(uuid.uuid4()),
    "urandom": lambda: os.urandom(8),
    "token": lambda: secrets.token_hex(),
    "randbelow": lambda: secrets.randbelow(10**12),
    "random.random": lambda: random.random(),
    "random.sample": lambda: random.sample(range(1000), 5),
    "random.gauss": lambda: random.gauss(),
    "Random()": lambda: random.Random().random(),
    "SystemRandom()": lambda: random.SystemRandom().random(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_ids_and_randomness_repeat_with_the_seed(name):
    first, again, other = (seen(DRAWS[name], seed) for seed in (7, 7, 8))

    assert first == again
    assert first != other or name == "uuid1"  # time and a counter
    assert DRAWS[name]() != DRAWS[name]()


def test_a_uuid1_carries_virtual_time_and_counts_up():
    one, two = seen(lambda: (uuid.uuid1(), uuid.uuid1()))

    assert (one.version, one.variant) == (1, uuid.RFC_4122)
    assert (one.time - 0x01B21DD213814000) / 1e7 == pytest.approx(EPOCH, abs=1)
    assert one != two
    assert one.time < two.time


def test_sqlite_tells_virtual_time_and_draws_what_the_seed_repeats():
    def asked(seed):
        acting = Acting(lambda: None)
        rows = []
        acting.simulation.eventually = [
            lambda view: rows.append(
                view.rows("actor", "SELECT unixepoch(), unixepoch(CURRENT_TIMESTAMP), random(), hex(randomblob(4))")[0]
            )
        ]
        assert acting.run(seed).violations == []
        return rows[0]

    assert asked(1) == asked(1)
    assert asked(1)[2:] != asked(2)[2:]
    assert asked(1)[:2] == (int(EPOCH), int(EPOCH))


def test_a_run_leaves_the_machine_as_it_was():
    random.seed(5)
    expected = [random.gauss(), random.gauss(), random.random()]
    random.seed(5)
    first = random.gauss()
    functions = time.time, dt.datetime.now, os.urandom, random.random
    bytecode = sys.dont_write_bytecode

    seen(lambda: (random.gauss(), random.seed(1), uuid.uuid1(), uuid.getnode()))

    assert [first, random.gauss(), random.random()] == expected
    assert functions == (time.time, dt.datetime.now, os.urandom, random.random)
    assert time.time.__self__ is time
    assert time.time() > EPOCH + 10_000_000
    assert abs(dt.datetime.now(UTC).timestamp() - time.time()) < 60
    assert sys.dont_write_bytecode == bytecode
    assert uuid.getnode() != 0x02005E005300


def test_another_thread_sees_the_real_machine():
    asked, answered = threading.Event(), threading.Event()
    found = []

    def look():
        asked.wait(20)
        found.extend([time.time(), dt.datetime.now().timestamp(), os.urandom(4), threading.Thread(target=list)])
        found[3].start()
        answered.set()

    thread = threading.Thread(target=look)
    thread.start()

    def act():
        asked.set()
        answered.wait(20)

    seen(act)
    thread.join()
    assert found[0] > EPOCH + 10_000_000
    assert found[1] > EPOCH + 10_000_000


def test_a_def_handler_may_sleep_in_virtual_time():
    def sleeps():
        before = time.time()
        time.sleep(12)
        return time.time() - before

    acting = Acting(sleeps, threaded=True)
    result = acting.run()

    assert result.violations == []
    assert acting.given == [pytest.approx(12)]
    assert 12 < result.seconds < 13


def test_two_simulations_at_once_are_refused():
    inner = Acting(lambda: None)
    acting = Acting(inner.run, dead_letters=True)

    result = acting.run()

    assert result.summary["dead"] == 1
    world = World(acting.simulation, Tape(), random=False)
    with pytest.raises(SimulationError) as caught, interception.simulated(world):
        inner.run()
    world.loop.close()
    assert caught.value.code == "E707"


def test_to_intercept_costs_little_per_run():
    world = World(Acting(lambda: None).simulation, Tape(), random=False)

    def once():
        with interception.simulated(world):
            pass

    once()
    cost_s = min(timeit.repeat(once, number=20, repeat=20)) / 20
    world.loop.close()
    assert cost_s < 100e-6
