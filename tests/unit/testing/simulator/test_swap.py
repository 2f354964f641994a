import gc
import sys
import time

import pytest

from trunkline.testing.simulator.swap import Swap, can_swap


@pytest.fixture
def swapped():
    swaps = []

    def swap(function, replacement):
        swaps.append(Swap(function, lambda original: lambda *args, **named: replacement(original, *args, **named)))
        swaps[-1].on()
        return swaps[-1]

    yield swap
    for each in swaps:
        each.off()


@pytest.mark.parametrize(
    ("function", "args", "named"),
    [
        (time.perf_counter_ns, (), {}),
        (sys.intern, ("a",), {}),
        (time.gmtime, (5,), {}),
        (sorted, ([2, 1],), {"reverse": True}),
        (sys.getsizeof, (b"a",), {"default": 3}),
    ],
    ids=["no arguments", "one", "a tuple", "fast with keywords", "a tuple and keywords"],
)
def test_a_c_function_of_each_calling_convention_calls_what_stands_for_it(swapped, function, args, named):
    alias = function
    swap = swapped(function, lambda original, *args, **named: (original, args, named))

    assert alias(*args, **named) == (swap.original, args, named)
    swap.off()
    before = swap.original(*args, **named)
    assert alias(*args, **named) == before or function is time.perf_counter_ns


def test_exceptions_of_what_stands_for_it_reach_the_caller(swapped):
    def fails(_original):
        raise KeyError("x")

    swapped(time.perf_counter_ns, fails)
    with pytest.raises(KeyError):
        time.perf_counter_ns()


def test_counts_of_references_stay_right_through_collections(swapped):
    def replaced(_original, _value):
        return 5

    bound_to = []  # which nobody else refers to
    count = bound_to.count
    swap = swapped(count, replaced)
    before = sys.getrefcount(bound_to)
    for _ in range(3):
        swap.on()
        gc.collect()
        assert count(1) == 5
        swap.off()
        gc.collect()
        assert count(1) == 0
    assert sys.getrefcount(bound_to) == before


def test_what_is_no_c_function_cannot_be_swapped():
    assert can_swap(time.time)
    assert not can_swap(lambda: None)
    assert not can_swap(str.join)
