"""LingerWatch: however a peer behaves, a close that waits for it has an end."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.conftest import fill, tcp_pair
from trioreactor import CloseReason, Timeouts, Watermarks
from trioreactor.channel import Channel
from trioreactor.default_poller import current_poller
from trioreactor.linger import LingerWatch
from trioreactor.send_buffer import SendBuffer

LINGER = 2.0

# A quarter of the high-water mark has to leave in each period.
MARKS = Watermarks(high=4000, low=100)
STEP = 1000


class Watched:
    """A watch on a real send buffer and a real poller, and when it said what."""

    def __init__(self, write: Any, linger: float) -> None:
        self.buffer: SendBuffer = write.buffer
        self.told: list[tuple[float, CloseReason | None]] = []
        self.left: int | None = None
        self.watch = LingerWatch(write, linger, self._expire)

    def _expire(self, reason: CloseReason | None) -> None:
        self.told.append((trio.current_time(), reason))
        self.left = self.buffer.size


@contextmanager
def watched(queued: int, *, marks: Watermarks = MARKS, linger: float = LINGER) -> Iterator[Watched]:
    """A watch over *queued* bytes, not started yet."""
    left, right = socket.socketpair()
    with left, right:
        # The poller's timers run while it has a channel.
        channel = Channel(
            current_poller(), left, on_readable=lambda: None, on_writable=lambda: None
        )
        buffer = SendBuffer(marks)
        if queued:
            buffer.append(bytes(queued))
        yield Watched(SimpleNamespace(buffer=buffer, channel=channel), linger)
        channel.close()


async def test_a_peer_that_takes_nothing(autojump_clock: MockClock) -> None:
    """If nothing leaves within the first period, that is the end, and the reason is a stall."""
    with watched(10000) as it:
        it.watch.start()
        await trio.sleep(100)
        assert it.told == [(LINGER, CloseReason.WRITE_STALLED)]


async def test_a_peer_that_takes_enough(autojump_clock: MockClock) -> None:
    """As long as a quarter of the high mark's worth leaves in each period, it may take its time."""
    with watched(10000) as it:
        it.watch.start()
        for _ in range(9):
            await trio.sleep(LINGER / 2)
            it.buffer.consume(STEP)
            await trio.sleep(LINGER / 2)
        assert it.told == []
        # With only that much left the rest must go in one period.
        await trio.sleep(LINGER / 2)
        it.buffer.consume(STEP - 1)
        await trio.sleep(100)
        assert it.told == [(10 * LINGER, CloseReason.WRITE_STALLED)]


async def test_a_peer_that_drips(autojump_clock: MockClock) -> None:
    """A peer that takes a little less than enough in a period gets no second one."""
    with watched(10000) as it:
        it.watch.start()
        await trio.sleep(LINGER / 2)
        it.buffer.consume(STEP - 1)
        await trio.sleep(100)
        assert it.told == [(LINGER, CloseReason.WRITE_STALLED)]


@pytest.mark.parametrize(
    "marks", [Watermarks(high=1, low=0), Watermarks(high=3, low=0), Watermarks(high=65536, low=0)]
)
async def test_no_marks_make_it_endless(marks: Watermarks, autojump_clock: MockClock) -> None:
    """Also with the smallest marks something must leave in each period."""
    with watched(10, marks=marks) as it:
        it.watch.start()
        await trio.sleep(100)
        assert it.told == [(LINGER, CloseReason.WRITE_STALLED)]


async def test_everything_sent(autojump_clock: MockClock) -> None:
    """If all has left when a period ends, the close goes on with no reason of the watch's own."""
    with watched(10000) as it:
        it.watch.start()
        await trio.sleep(LINGER / 2)
        it.buffer.consume(10000)
        await trio.sleep(100)
        assert it.told == [(LINGER, None)]


async def test_waiting_for_the_peers_end(autojump_clock: MockClock) -> None:
    """With nothing queued the watch is for the peer's own close, and is over after one period."""
    with watched(0) as it:
        it.watch.start()
        await trio.sleep(100)
        assert it.told == [(LINGER, None)]


async def test_starting_again_begins_a_new_period(autojump_clock: MockClock) -> None:
    """A second start takes the place of the first: there is one period, from then on."""
    with watched(0) as it:
        it.watch.start()
        await trio.sleep(LINGER / 2)
        it.watch.start()
        await trio.sleep(100)
        assert it.told == [(LINGER * 1.5, None)]


async def test_stopping(autojump_clock: MockClock) -> None:
    """A stopped watch says nothing, ever; stopping twice, or before the start, is no error."""
    with watched(10) as it:
        it.watch.stop()
        it.watch.start()
        await trio.sleep(LINGER / 2)
        it.watch.stop()
        it.watch.stop()
        await trio.sleep(100)
        assert it.told == []


async def test_no_patience_at_all(autojump_clock: MockClock) -> None:
    """A linger of 0 seconds ends at once, and never inside `start`."""
    with watched(10, linger=0) as it:
        it.watch.start()
        assert it.told == []
        with trio.fail_after(1):
            while not it.told:
                await trio.sleep(0.01)
        assert it.told[0][1] is CloseReason.WRITE_STALLED


@given(
    queued=st.integers(1, 50000),
    drips=st.lists(st.tuples(st.floats(0.01, 5), st.integers(1, 3000)), max_size=60),
    high=st.integers(1, 20000),
)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_every_wait_has_an_end(queued: int, drips: list[tuple[float, int]], high: int) -> None:
    """However the peer drips, each quarter of the high mark gets it no more than one period."""

    async def main() -> None:
        with watched(queued, marks=Watermarks(high=high, low=0)) as it:
            it.watch.start()
            for seconds, n in drips:
                await trio.sleep(seconds)
                it.buffer.consume(min(n, it.buffer.size))
            await trio.sleep(queued * LINGER)
            ((at, reason),) = it.told
            assert at <= LINGER * (1 + queued / max(1, high // 4)) + 1e-6
            assert at / LINGER == pytest.approx(round(at / LINGER))
            assert (reason is None) == (it.left == 0)

    trio.run(main, clock=MockClock(autojump_threshold=0))


# -- on a real connection


async def test_aclose_of_a_stalled_connection(autojump_clock: MockClock) -> None:
    """`aclose` with queued data and a peer that never reads ends after one period."""
    left, right = await tcp_pair(timeouts=Timeouts(linger=LINGER))
    await fill(left)
    await left.aclose()
    assert trio.current_time() == pytest.approx(LINGER)
    assert left.close_reason is CloseReason.WRITE_STALLED
    right.force_close()


async def test_shutdown_and_a_peer_that_never_closes(autojump_clock: MockClock) -> None:
    """After `shutdown` a peer that keeps its side open is waited for one period."""
    left, right = await tcp_pair(timeouts=Timeouts(linger=LINGER))
    left.shutdown()
    await left.wait_closed()
    assert trio.current_time() == pytest.approx(LINGER)
    assert left.close_reason is CloseReason.LOCAL_CLOSE
    right.force_close()


async def test_linger_turned_off(autojump_clock: MockClock) -> None:
    """With linger=None a close waits for as long as the peer pleases."""
    left, right = await tcp_pair(timeouts=Timeouts(linger=None))
    left.shutdown()
    with trio.move_on_after(1e6) as scope:
        await left.wait_closed()
    assert scope.cancelled_caught
    left.force_close()
    right.force_close()


@pytest.mark.parametrize(
    ("before", "after", "ends"), [(2, 0.5, 1), (2, 5, 5), (2, 3, 3), (None, 3, 4), (2, None, None)]
)
async def test_changed_while_it_lingers(
    before: float | None, after: float | None, ends: float | None, autojump_clock: MockClock
) -> None:
    """Another linger holds for a close that waits, too: what has passed counts, where it was
    counted.
    """
    left, right = await tcp_pair(timeouts=Timeouts(linger=before))
    left.shutdown()
    await trio.sleep(1)
    left.timeouts = Timeouts(linger=after)
    with trio.move_on_after(1000):
        await left.wait_closed()
    assert trio.current_time() == pytest.approx(1000 + 1 if ends is None else ends, abs=0.01)
    left.force_close()
    right.force_close()
