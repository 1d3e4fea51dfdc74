"""TimingWheel: never early, late by less than a tick, and what is cancelled is gone."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trioreactor.timer_queue import Timer, TimerQueue
from trioreactor.timing_wheel import ENTRIES_PER_TURN, Entry, Slot, TimingWheel, tick_of

pytestmark = pytest.mark.pure

TICK = 0.25


class Clock:
    """Time for a wheel: timers run when it is told to pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers = TimerQueue()
        self.timers_set = 0
        self.wheel = TimingWheel(self._call_at)

    def _call_at(self, deadline: float, fn: Callable[[], object]) -> Timer:
        self.timers_set += 1
        return self.timers.add(deadline, fn)

    def turn(self) -> None:
        """Run what is due."""
        for fn in self.timers.pop_due(self.now):
            fn()

    def pass_until(self, end: float) -> None:
        """Let time pass, from timer to timer."""
        while (deadline := self.timers.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.turn()
        self.now = end


def nothing() -> None:
    """Do nothing."""


def slots_living() -> int:
    """How many slots there are, cyclic garbage included."""
    return sum(type(thing) is Slot for thing in gc.get_objects())


@given(seconds=st.floats(5e-324, 1e300))
def test_ticks(seconds: float) -> None:
    """A tick is a power of two, and a thirty-second of the time or less, within its bounds."""
    tick = tick_of(seconds)
    assert tick.hex().startswith("0x1.0000000000000p")
    assert 2.0**-7 <= tick <= 1.0
    assert tick <= max(seconds / 32, 2.0**-7)
    assert tick > seconds / 64 or tick == 1.0


# Trio's clock begins anywhere below a million.
moments = st.floats(0, 2_000_000)
spans = st.floats(0.001, 5000)


@given(now=moments, several=st.lists(st.tuples(spans, st.booleans()), max_size=30))
@settings(deadline=None, derandomize=True)
def test_when_they_come(now: float, several: list[tuple[float, bool]]) -> None:
    """Each is called once, never early and late by less than its tick, unless cancelled before;
    afterwards there is no slot and no timer left.
    """
    clock = Clock()
    clock.now = now
    calls: dict[int, list[float]] = {}
    entries: list[Entry] = []
    for n, (seconds, _) in enumerate(several):
        calls[n] = []
        entries.append(
            clock.wheel.add(now + seconds, tick_of(seconds), lambda n=n: calls[n].append(clock.now))
        )
    assert len(clock.wheel) == len(several)
    for entry, (_, cancelled) in zip(entries, several, strict=True):
        if cancelled:
            entry.cancel()
    assert len(clock.wheel) == sum(not cancelled for _, cancelled in several)
    clock.pass_until(now + 10_000)
    for n, (seconds, cancelled) in enumerate(several):
        if cancelled:
            assert calls[n] == []
        else:
            (at,) = calls[n]
            assert now + seconds <= at < now + seconds + tick_of(seconds)
    assert len(clock.wheel) == 0
    assert clock.wheel._slots == {}
    assert clock.timers.next_deadline() is None


def test_one_timer_for_a_slot() -> None:
    """Thousands in the same tick set one timer, and slots of several ticks meet."""
    clock = Clock()
    for n in range(5000):
        clock.wheel.add(0.76 + 0.2 * n / 5000, TICK, nothing)
    assert clock.timers_set == 1
    clock.wheel.add(0.9, 1.0, nothing)
    assert clock.timers_set == 1
    clock.wheel.add(1.01, TICK, nothing)
    assert clock.timers_set == 2


def test_in_the_order_in_which_they_came() -> None:
    """Within a slot the first added is called first."""
    clock = Clock()
    called: list[int] = []
    for n in range(3):
        clock.wheel.add(0.9 - n / 10, 1.0, lambda n=n: called.append(n))
    clock.pass_until(1)
    assert called == [0, 1, 2]


def test_cancelling_lets_go() -> None:
    """A cancelled one holds neither its function nor its slot, at once and with no collection."""

    class Something:
        def method(self) -> None:
            raise AssertionError("it was cancelled")

    gc.collect()
    gc.disable()
    try:
        clock = Clock()
        something = Something()
        alone, beside = weakref.ref(something), Something()
        entry = clock.wheel.add(1, TICK, something.method)
        clock.wheel.add(1, TICK, nothing)
        others = clock.wheel.add(2, TICK, beside.method)
        assert slots_living() == 2
        del something
        assert alone() is not None
        entry.cancel()
        entry.cancel()
        assert alone() is None
        assert len(clock.wheel) == 2
        others.cancel()
        # The last of its slot takes that with it, and its timer.
        assert slots_living() == 1
        assert list(clock.wheel._slots) == [1]
        clock.pass_until(1)
        assert clock.timers.next_deadline() is None
    finally:
        gc.enable()


def test_what_was_called_lets_go() -> None:
    """A function that was called is held no longer, though its entry is."""
    gc.collect()
    gc.disable()
    try:
        clock = Clock()

        class Something:
            called = 0

            def method(self) -> None:
                Something.called += 1

        something = Something()
        gone = weakref.ref(something)
        entry = clock.wheel.add(1, TICK, something.method)
        del something
        clock.pass_until(1)
        assert Something.called == 1
        assert gone() is None
        assert slots_living() == 0
        entry.cancel()
        entry.run()
        assert Something.called == 1
    finally:
        gc.enable()


def test_cancelling_touches_nobody_else() -> None:
    """O(1): cancelling costs the same number of steps whether one is in the slot or thousands."""

    def steps(size: int) -> int:
        clock = Clock()
        entries = [clock.wheel.add(1, TICK, nothing) for _ in range(size)]
        count = 0

        def trace(frame: object, event: str, argument: object) -> Callable[..., object]:
            nonlocal count
            count += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            entries[size // 2].cancel()
        finally:
            sys.settrace(before)
        return count

    assert 0 < steps(10) == steps(5000)


def test_one_cancels_another_of_its_slot() -> None:
    """An entry may cancel one that would have come after it in the same turn, or itself."""
    clock = Clock()
    called: list[str] = []
    entries: dict[str, Entry] = {}

    def first() -> None:
        called.append("first")
        entries["second"].cancel()
        entries["first"].cancel()

    entries["first"] = clock.wheel.add(1, TICK, first)
    entries["second"] = clock.wheel.add(1, TICK, lambda: called.append("second"))
    entries["third"] = clock.wheel.add(1, TICK, lambda: called.append("third"))
    clock.pass_until(1)
    assert called == ["first", "third"]
    assert len(clock.wheel) == 0


@pytest.mark.parametrize("others", [0, 1, ENTRIES_PER_TURN])
def test_one_adds_to_its_own_moment(others: int) -> None:
    """An entry may add another for the moment that is now: it is called soon, not in this turn,
    so one that adds itself again and again keeps nobody else from their turn.
    """
    clock = Clock()
    called: list[int] = []

    def again() -> None:
        called.append(len(called))
        if len(called) < 5:
            clock.wheel.add(1, TICK, again)

    clock.wheel.add(1, TICK, again)
    for _ in range(others):
        clock.wheel.add(1, TICK, nothing)
    clock.now = 1
    clock.turn()
    assert called == [0]
    clock.pass_until(1)
    assert called == [0, 1, 2, 3, 4]
    assert clock.wheel._slots == {}
    assert clock.timers.next_deadline() is None


def test_a_crowd_takes_several_turns() -> None:
    """Of thousands that are due at one moment only so many are called before others' turn, and
    those that wait can still be cancelled.
    """
    clock = Clock()
    called: list[int] = []
    number = 10 * ENTRIES_PER_TURN
    entries = [clock.wheel.add(1, TICK, lambda n=n: called.append(n)) for n in range(number)]
    clock.now = 1
    clock.turn()
    assert called == list(range(ENTRIES_PER_TURN))
    assert len(clock.wheel) == number - ENTRIES_PER_TURN
    entries[-1].cancel()
    clock.pass_until(1)
    assert called == list(range(number - 1))
    assert clock.wheel._slots == {}


def test_one_that_raises() -> None:
    """What one raises leaves the wheel, and keeps none of the others from being called."""
    clock = Clock()
    called: list[str] = []

    def fails() -> None:
        raise ValueError("on purpose")

    clock.wheel.add(1, TICK, lambda: called.append("before"))
    clock.wheel.add(1, TICK, fails)
    clock.wheel.add(1, TICK, lambda: called.append("after"))
    with pytest.raises(ValueError, match="on purpose"):
        clock.pass_until(1)
    clock.pass_until(1)
    assert called == ["before", "after"]
    assert clock.wheel._slots == {}


def test_a_moment_that_has_passed() -> None:
    """A deadline in the past is called soon, never at once."""
    clock = Clock()
    clock.now = 100
    called: list[float] = []
    clock.wheel.add(1, TICK, lambda: called.append(clock.now))
    assert called == []
    clock.turn()
    assert called == [100]
