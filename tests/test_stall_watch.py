"""StallWatch: a stall is noticed when it has lasted, and progress is never mistaken for one."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from trioreactor.channel import Channel
from trioreactor.default_poller import current_poller
from trioreactor.poller import Poller
from trioreactor.stall_watch import StallWatch
from trioreactor.timing_wheel import tick_of

PATIENCE = 5.0


@contextmanager
def polled() -> Iterator[Poller]:
    """A poller that runs: its timers do so while it has a channel."""
    left, right = socket.socketpair()
    with left, right:
        channel = Channel(
            current_poller(), left, on_readable=lambda: None, on_writable=lambda: None
        )
        yield channel.poller
        channel.close()


class Stalls:
    """When stalls were reported, and that none came late."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, was_away: bool) -> None:
        assert not was_away
        self.at.append(trio.current_time())


async def test_nothing_moves(autojump_clock: MockClock) -> None:
    """Without any progress the stall is reported once, when patience has run out."""
    stalls = Stalls()
    with polled() as poller:
        StallWatch(PATIENCE, stalls).start(poller)
        await trio.sleep(100)
    assert stalls.at == [PATIENCE]


async def test_not_before_it_begins(autojump_clock: MockClock) -> None:
    """The time before the start does not count."""
    stalls = Stalls()
    with polled() as poller:
        watch = StallWatch(PATIENCE, stalls)
        await trio.sleep(100)
        watch.start(poller)
        await trio.sleep(100)
    assert stalls.at == [100 + PATIENCE]


async def test_starting_twice_is_starting_once(autojump_clock: MockClock) -> None:
    """A start while the watch runs is no progress: writing in vain must not look like moving."""
    stalls = Stalls()
    with polled() as poller:
        watch = StallWatch(PATIENCE, stalls)
        for _ in range(20):
            watch.start(poller)
            await trio.sleep(PATIENCE / 10)
            if stalls.at:
                break
    assert stalls.at == [pytest.approx(PATIENCE)]


async def test_progress_gives_time(autojump_clock: MockClock) -> None:
    """Each progress gives the full patience again, counted from it."""
    stalls = Stalls()
    with polled() as poller:
        watch = StallWatch(PATIENCE, stalls)
        watch.start(poller)
        for _ in range(10):
            await trio.sleep(PATIENCE * 0.9)
            watch.progress()
        moved = trio.current_time()
        await trio.sleep(100)
    assert stalls.at == [pytest.approx(moved + PATIENCE)]


async def test_stopping(autojump_clock: MockClock) -> None:
    """A stopped watch reports nothing; it can begin again, with the full patience."""
    stalls = Stalls()
    with polled() as poller:
        watch = StallWatch(PATIENCE, stalls)
        watch.stop()
        watch.start(poller)
        await trio.sleep(PATIENCE * 0.9)
        watch.stop()
        watch.stop()
        await trio.sleep(100)
        assert stalls.at == []
        begun = trio.current_time()
        watch.start(poller)
        await trio.sleep(100)
    (at,) = stalls.at
    assert begun + PATIENCE <= at < begun + PATIENCE + tick_of(PATIENCE)


# Not in the tick in which patience runs out, where either would be right.
TICK = tick_of(PATIENCE)
gaps = st.floats(0, 0.99 * PATIENCE) | st.floats(PATIENCE + TICK, 2 * PATIENCE)


@given(waits=st.lists(gaps, max_size=30))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_exactly_the_first_gap(waits: list[float]) -> None:
    """What is reported is the first time in which nothing moved for as long as patience lasts, at
    most a tick late.
    """
    stalls = Stalls()

    async def main() -> None:
        with polled() as poller:
            watch = StallWatch(PATIENCE, stalls)
            watch.start(poller)
            for wait in waits:
                await trio.sleep(wait)
                watch.progress()
            await trio.sleep(2 * PATIENCE)

    trio.run(main, clock=MockClock(autojump_threshold=0))
    now = 0.0
    for wait in [*waits, 2 * PATIENCE]:
        if wait >= PATIENCE:
            break
        now += wait
    (at,) = stalls.at
    assert now + PATIENCE - 1e-9 <= at < now + PATIENCE + TICK


@pytest.mark.parametrize(("late", "was_away"), [(0.0, False), (0.2, False), (PATIENCE, True)])
async def test_a_loop_that_was_away(late: float, was_away: bool, mock_clock: MockClock) -> None:
    """Whoever is told is told, too, whether that comes late."""
    told: list[bool] = []
    with polled() as poller:
        StallWatch(PATIENCE, told.append).start(poller)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(PATIENCE + late)
        await trio.testing.wait_all_tasks_blocked()
    assert told == [was_away]


async def test_less_patience_is_not_late(mock_clock: MockClock) -> None:
    """Patience that a change has ended was not ended by a loop that was away."""
    told: list[bool] = []
    with polled() as poller:
        watch = StallWatch(100 * PATIENCE, told.append)
        watch.start(poller)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(50 * PATIENCE)
        watch.change(PATIENCE, poller)
        await trio.testing.wait_all_tasks_blocked()
    assert told == [False]
