"""ConnectionCounters: what has ended and what lives add up, and no count is lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass, fields

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.simulated import SimulatedSocket, simulated
from trioreactor import CloseReason, ConnectionState, TcpConnection, Watermarks
from trioreactor.connection_counters import ConnectionCounters, ConnectionTotals
from trioreactor.connection_statistics import ConnectionStatistics

SUMMED = [field.name for field in fields(ConnectionStatistics)]


def consistent(totals: ConnectionTotals) -> bool:
    """Promise C."""
    return totals.opened - sum(totals.closed.values()) == totals.active


async def test_the_sums() -> None:
    """Each counter is the sum over ended and living connections; ended ones count by reason."""
    counters = ConnectionCounters()
    conns: list[tuple[TcpConnection, SimulatedSocket]] = []
    for n in range(1, 5):
        conn, sock = simulated(room=10 * n, watermarks=Watermarks(high=100, low=10))
        counters.opened += 1
        sock.peer_sends(bytes(n))
        await trio.testing.wait_all_tasks_blocked()
        await conn.receive_some()
        conn.send(bytes(10 * n + 200))
        conns.append((conn, sock))
    living = [conn for conn, _ in conns]
    whole = counters.totals(living)
    assert (whole.opened, whole.active, dict(whole.closed)) == (4, 4, {})
    assert (whole.bytes_received, whole.bytes_sent) == (10, 100)
    assert (whole.buffered, whole.pauses, whole.resumes) == (800, 4, 0)
    assert consistent(whole)
    # One of them gets room, and sinks to its low mark.
    conns[0][1].peer_takes(200)
    await trio.testing.wait_all_tasks_blocked()
    for reason in (CloseReason.FORCED, CloseReason.FORCED, CloseReason.IDLE_TIMEOUT):
        ended = living.pop()
        ended.force_close(reason)
        counters.count_end(ended)
        now = counters.totals(living)
        assert consistent(now)
        # Nothing that was counted is forgotten with its connection; what was queued is dropped.
        assert (now.opened, now.active) == (4, len(living))
        assert (now.bytes_received, now.bytes_sent) == (10, 300)
        assert (now.pauses, now.resumes) == (4, 1)
        assert now.buffered == 200 * (len(living) - 1)
    assert dict(now.closed) == {CloseReason.FORCED: 2, CloseReason.IDLE_TIMEOUT: 1}
    living[0].force_close()


@pytest.mark.parametrize("opened", [True, False])
async def test_what_comes_before_it_is_opened(opened: bool) -> None:
    """A header that is forgotten when a connection is opened was in no total: none goes back."""
    counters = ConnectionCounters()
    conn, sock = simulated(state=ConnectionState.CONNECTING)
    counters.opened += 1
    sock.peer_sends(b"header")
    await conn.receive_some()
    assert conn.statistics().bytes_received == 6
    assert counters.totals([conn]).bytes_received == 0
    if opened:
        conn.opened()
        sock.peer_sends(b"four")
        await trio.testing.wait_all_tasks_blocked()
        assert counters.totals([conn]).bytes_received == 0
        await conn.receive_some()
    before = counters.totals([conn]).bytes_received
    conn.force_close()
    counters.count_end(conn)
    assert counters.totals([]).bytes_received == (4 if opened else 6) >= before


async def test_what_was_given_out_does_not_change() -> None:
    """Totals are neither changed by what comes nor a way to change the counters."""
    counters = ConnectionCounters()
    conn, _ = simulated()
    counters.opened += 1
    before = counters.totals([conn])
    conn.send(b"four")
    during = counters.totals([conn])
    conn.force_close()
    counters.count_end(conn)
    after = counters.totals([])
    assert [totals.bytes_sent for totals in (before, during, after)] == [0, 4, 4]
    assert [totals.active for totals in (before, during, after)] == [1, 1, 0]
    assert [dict(totals.closed) for totals in (before, during)] == [{}, {}]
    with pytest.raises(TypeError):
        after.closed[CloseReason.FORCED] = 5  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        after.opened = 7  # type: ignore[misc]
    assert dict(counters.totals([]).closed) == {CloseReason.FORCED: 1}


def test_asking_counts_nothing() -> None:
    """However often totals are asked for, they are the same; of no connections all are zero."""
    counters = ConnectionCounters()
    nothing = ConnectionTotals(
        opened=0,
        active=0,
        closed={},
        bytes_received=0,
        bytes_sent=0,
        buffered=0,
        pauses=0,
        resumes=0,
        dropped=0,
    )
    for _ in range(3):
        assert counters.totals([]) == nothing
    live = Numbers(3)
    counters.opened += 1
    first = counters.totals([live])  # type: ignore[list-item]
    assert counters.totals([live]) == first  # type: ignore[list-item]


def test_the_living_may_be_given_once() -> None:
    """Any iterable of the living is taken, an iterator too."""
    counters = ConnectionCounters()
    counters.opened += 2
    living: Iterator[object] = iter([Numbers(1), Numbers(2)])
    totals = counters.totals(living)  # type: ignore[arg-type]
    assert (totals.active, totals.bytes_received) == (2, 3)


def test_as_fields() -> None:
    """The fields come by name, all of them, so that a kind with more can be made of them."""
    totals = ConnectionCounters().totals([])
    assert totals.as_fields().keys() == {field.name for field in fields(ConnectionTotals)}
    assert ConnectionTotals(**totals.as_fields()) == totals


@dataclass
class Numbers:
    """A connection as far as counting looks at it."""

    number: int
    close_reason: CloseReason | None = None
    state: ConnectionState = ConnectionState.CONNECTED

    def statistics(self) -> ConnectionStatistics:
        """Something else in every field."""
        return ConnectionStatistics(
            **{name: self.number * factor for factor, name in enumerate(SUMMED, 1)}
        )


@given(st.lists(st.tuples(st.integers(0, 100), st.none() | st.sampled_from(CloseReason))))
def test_any_history(history: list[tuple[int, CloseReason | None]]) -> None:
    """Whichever connections end, and by what: promise C holds after each, and every sum is that
    over all there have been.
    """
    counters = ConnectionCounters()
    living: list[Numbers] = []
    for so_far, (number, reason) in enumerate(history, 1):
        conn = Numbers(number, reason)
        counters.opened += 1
        living.append(conn)
        assert consistent(counters.totals(living))  # type: ignore[arg-type]
        if reason is not None:
            counters.count_end(living.pop())  # type: ignore[arg-type]
        totals = counters.totals(living)  # type: ignore[arg-type]
        assert consistent(totals)
        assert totals.opened == so_far
        whole = sum(number for number, _ in history[:so_far])
        now = sum(conn.number for conn in living)
        # Nothing waits to be sent on an ended one.
        assert [getattr(totals, name) for name in SUMMED] == [
            (now if name == "buffered" else whole) * factor for factor, name in enumerate(SUMMED, 1)
        ]
    reasons = [reason for _, reason in history if reason is not None]
    assert dict(counters.totals([]).closed) == {r: reasons.count(r) for r in set(reasons)}
