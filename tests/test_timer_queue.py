"""TimerQueue: everything due, in order, once; nothing that was cancelled; and no growing heap."""

from __future__ import annotations

import socket
import weakref
from collections.abc import Callable

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from trioreactor.channel import Channel
from trioreactor.default_poller import current_poller
from trioreactor.timer_queue import Timer, TimerQueue

pytestmark = pytest.mark.pure


def nothing() -> None:
    """What a timer does whose running is of no interest."""


def run_due(queue: TimerQueue, now: float) -> None:
    """What the poller does."""
    for fn in queue.pop_due(now):
        fn()


class TimerQueueModel(RuleBasedStateMachine):
    """A TimerQueue beside a dictionary of what has to run."""

    timers = Bundle("timers")

    def __init__(self) -> None:
        super().__init__()
        self.queue = TimerQueue()
        self.now = 0.0
        # Deadline and name of what is neither run nor cancelled.
        self.live: dict[int, float] = {}
        self.ran: list[int] = []
        self.count = 0
        self.peak = 0

    @rule(target=timers, seconds=st.integers(-2, 20))
    def add(self, seconds: int) -> tuple[int, Timer]:
        name = self.count
        self.count += 1
        self.live[name] = self.now + seconds
        return name, self.queue.add(self.now + seconds, lambda: self.ran.append(name))

    @rule(seconds=st.integers(0, 20), n=st.integers(1, 100))
    def add_and_cancel_many(self, seconds: int, n: int) -> None:
        for _ in range(n):
            self.queue.add(self.now + seconds, lambda: self.ran.append(-1)).cancel()

    @rule(timer=timers)
    def cancel(self, timer: tuple[int, Timer]) -> None:
        # Also one that has run, and one that was cancelled before.
        timer[1].cancel()
        self.live.pop(timer[0], None)

    @rule(seconds=st.integers(0, 10))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds
        # Equal deadlines run in the order in which they were set.
        due = sorted((at, name) for name, at in self.live.items() if at <= self.now)
        run_due(self.queue, self.now)
        assert self.ran == [name for _, name in due]
        self.ran.clear()
        for _, name in due:
            del self.live[name]

    @invariant()
    def next_deadline(self) -> None:
        assert self.queue.next_deadline() == (min(self.live.values()) if self.live else None)

    @invariant()
    def bounded(self) -> None:
        self.peak = max(self.peak, len(self.live))
        assert len(self.live) <= len(self.queue) <= max(64, 2 * self.peak) + 1


TimerQueueModel.TestCase.settings = settings(
    deadline=None, derandomize=True, max_examples=60, stateful_step_count=40
)
TestTimerQueueModel = TimerQueueModel.TestCase


def test_at_its_deadline_and_not_before() -> None:
    """A timer is due from its deadline on, the deadline included."""
    queue = TimerQueue()
    ran: list[str] = []
    queue.add(5.0, lambda: ran.append("ran"))
    run_due(queue, 4.999)
    assert not ran
    assert queue.next_deadline() == 5.0
    run_due(queue, 5.0)
    run_due(queue, 5.0)
    assert ran == ["ran"]
    assert queue.next_deadline() is None


def test_cancelled_timers_do_not_pile_up() -> None:
    """Setting and cancelling, as a timeout for each request does, keeps the heap small."""
    queue = TimerQueue()
    live = [queue.add(1e9 + i, nothing) for i in range(100)]
    largest = 0
    for i in range(20000):
        queue.add(1e6 + i, nothing).cancel()
        largest = max(largest, len(queue))
    assert largest <= 2 * len(live) + 64
    assert queue.next_deadline() == 1e9


def test_a_sweep_keeps_the_live_ones() -> None:
    """Whatever a sweep removes, what is live runs in order."""
    queue = TimerQueue()
    ran: list[int] = []
    for i in range(1000):
        timer = queue.add(float(997 * i % 1000), lambda i=i: ran.append(997 * i % 1000))
        if i % 3:
            timer.cancel()
    run_due(queue, 1000.0)
    assert ran == sorted(997 * i % 1000 for i in range(0, 1000, 3))
    assert len(queue) == 0


def test_no_sweep_for_a_heap_of_live_ones() -> None:
    """Sweeps come when the heap has doubled, so that many live timers cost no sweep each."""
    queue = TimerQueue()
    sweeps = 0
    heap = queue._heap
    for i in range(10000):
        queue.add(float(i), nothing)
        if queue._heap is not heap:
            heap = queue._heap
            sweeps += 1
    assert len(queue) == 10000
    assert sweeps <= 10


def test_cancelling_lets_go() -> None:
    """What a cancelled timer's function holds is free at once, not at its deadline."""

    class Held:
        def method(self) -> None:
            """What the timer would do."""

    queue = TimerQueue()
    held = Held()
    gone = weakref.ref(held)
    timer = queue.add(1e9, held.method)
    del held
    assert gone() is not None
    timer.cancel()
    assert gone() is None
    timer.cancel()


def in_one_batch(*make: Callable[[list[Timer], list[str]], None]) -> list[str]:
    """Run timers through a real poller, all due at one time; what ran."""
    ran: list[str] = []

    async def main() -> None:
        left, right = socket.socketpair()
        with left, right:
            # The poller runs while it has a channel.
            channel = Channel(current_poller(), left, on_readable=nothing, on_writable=nothing)
            timers: list[Timer] = []
            at = trio.current_time() + 1
            for fn in make:
                timers.append(channel.poller.call_at(at, lambda fn=fn: fn(timers, ran)))
            await trio.sleep(2)
            channel.close()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return ran


def test_cancelled_by_one_due_at_the_same_time() -> None:
    """A timer that another one cancels does not run, although both were due at once."""

    def cancel_others(timers: list[Timer], ran: list[str]) -> None:
        ran.append("first")
        for timer in timers[1:]:
            timer.cancel()

    def never(timers: list[Timer], ran: list[str]) -> None:
        ran.append("cancelled")

    assert in_one_batch(cancel_others, never, never) == ["first"]


def test_a_raising_timer_stops_no_other() -> None:
    """What one timer raises costs the others of its moment nothing."""

    def fail(timers: list[Timer], ran: list[str]) -> None:
        ran.append("fails")
        raise ValueError("on purpose")

    assert in_one_batch(fail, lambda _, ran: ran.append("runs")) == ["fails", "runs"]


def test_set_by_one_that_is_due() -> None:
    """A timer set by a timer, for a time already come, runs too and does not hold up the rest."""

    def again(timers: list[Timer], ran: list[str]) -> None:
        ran.append("first")
        poller = current_poller()
        poller.call_at(trio.current_time(), lambda: ran.append("third"))

    assert in_one_batch(again, lambda _, ran: ran.append("second")) == ["first", "second", "third"]
