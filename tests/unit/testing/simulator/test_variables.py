"""Variables of modules: each run finds them as they were, a crash clears what one service alone can see."""

import itertools
import sys
import textwrap

import pytest

from trunkline.testing.simulator import Simulation
from trunkline.testing.simulator.campaign import Plan, carry_out, repeat

SHARED = """
    import itertools
    from collections import defaultdict, deque
    from trunkline import Queue, Service, Stream, Struct, System

    orders = Stream("{name}-orders", key="number")

    @orders.event
    class Placed(Struct):
        number: int

    jobs = Queue("{name}-jobs")

    @jobs.command
    class Pack(Struct):
        number: int

    seen = 0
    numbers = [[], {{1, 2}}]
    by_name = defaultdict(list, a=[1])
    last = deque([0], maxlen=3)
    ids = itertools.count(5)

    class Desk:
        open = True
        names = {{}}

    desk = Service("desk")

    @desk.handle
    async def place(order: Placed) -> Pack:
        global seen
        seen += 1
        numbers[0].append(order.number)
        by_name["a"].append(2)
        last.append(1)
        next(ids)
        Desk.open = False
        Desk.names[order.number] = 1
        return Pack(order.number)

    {packer}

    @packer.handle
    async def pack(job: Pack) -> None:
        pass

    system = System("{name}", [desk, packer] if packer is not desk else [desk])
"""
CHANGED = {"seen", "numbers", "by_name", "last", "ids", "Desk.open", "Desk.names"}


def state(module):
    return (
        module.seen, [*module.numbers[0]], {*module.numbers[1]}, {k: [*v] for k, v in module.by_name.items()},
        [*module.last], repr(module.ids), module.Desk.open, {**module.Desk.names},
    )  # fmt: skip


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Return a function that writes the module and imports it."""
    monkeypatch.syspath_prepend(tmp_path)
    names = (f"variables_{number}" for number in itertools.count())

    def write(packer):
        name = f"{next(names)}_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(SHARED).format(name=name.replace("_", "-"), packer=packer))
        __import__(name)
        return sys.modules[name]

    yield write
    for name in [name for name in sys.modules if name.startswith("variables_")]:
        del sys.modules[name]


def simulation(module, **options):
    async def use(sim):
        await sim.publish(module.Placed(1))
        await sim.publish(module.Placed(2))

    return Simulation(module.system, use, **options)


def test_a_run_finds_the_variables_as_they_were(written):
    module = written("packer = desk")
    before, numbers = state(module), module.numbers
    inside = []

    def look(_view):
        inside.append(state(module))

    carry_out(simulation(module, eventually=[look]), Plan(crash_sweep=False, points=False, seeds=5))
    assert state(module) == before
    assert module.numbers is numbers
    assert inside[0] == (2, [1, 2], {1, 2}, {"a": [1, 2, 2]}, [0, 1, 1], "count(7)", False, {1: 1, 2: 1})
    assert {len(one[1]) for one in inside} == {2}


def test_what_was_replaced_before_a_search_stays_replaced(written, monkeypatch):
    module = written("packer = desk")
    seen = []

    def look(_view):
        seen.append(module.seen)

    made = simulation(module, eventually=[look])
    monkeypatch.setattr(module, "seen", 100)
    carry_out(made, Plan(crash_sweep=False, points=False, seeds=2))
    assert set(seen) == {102}
    assert module.seen == 100


def test_a_container_may_contain_itself(written):
    module = written("packer = desk")
    module.numbers.append(module.numbers)
    carry_out(simulation(module), Plan(crash_sweep=False, points=False))
    assert module.numbers[:2] == [[], {1, 2}]
    assert module.numbers[2] is module.numbers


def test_a_crash_clears_what_one_service_alone_can_see(written):
    module = written("packer = desk")
    most = []

    def look(_view):
        most.append(module.seen)

    report = carry_out(simulation(module, eventually=[look]), Plan(points=False))
    assert report.failures == []
    assert min(most) < 2, "no crash after the first message cleared the count"
    assert report.doubts() == []


def test_what_services_share_outlives_a_crash_and_is_told(written):
    module = written('packer = Service("packer")')
    report = carry_out(simulation(module), Plan(points=False))
    assert {name.partition(".")[2] for name in report.outlived} == CHANGED
    (doubt,) = report.doubts()
    assert f"{module.__name__}.seen" in doubt


def test_several_processes_of_a_service_share_and_are_told(written):
    module = written("packer = desk")
    report = carry_out(simulation(module, processes=2), Plan(crash_sweep=False, points=False, seeds=1))
    assert f"{module.__name__}.seen" in report.outlived


def test_a_bug_with_a_variable_is_found_and_its_tape_repeats_it(written):
    module = written("packer = desk")

    def counted(_view):
        assert module.seen == 2

    checked = simulation(module, eventually=[counted])
    report = carry_out(checked, Plan(points=False))
    (failure,) = report.failures
    assert repeat(checked, failure.result.tape, failure.violation.promise).violation == failure.violation
