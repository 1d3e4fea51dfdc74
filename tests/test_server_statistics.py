"""ServerStatistics: what has ended and what lives add up, and no count is lost."""

from __future__ import annotations

import pytest
import trio

from tests.simulated import SimulatedSocket, simulated
from trioreactor import CloseReason, TcpConnection, Watermarks
from trioreactor.server_statistics import ServerCounters, ServerStatistics


def consistent(statistics: ServerStatistics) -> bool:
    """Promise C."""
    return statistics.opened - sum(statistics.closed.values()) == statistics.active


async def test_the_sums() -> None:
    """Each counter is the sum over ended and living connections; ended ones count by reason."""
    counters = ServerCounters()
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
    whole = counters.snapshot(living, shed=0)
    assert (whole.active, dict(whole.closed)) == (4, {})
    assert (whole.bytes_received, whole.bytes_sent) == (10, 100)
    assert (whole.buffered, whole.pauses, whole.resumes) == (800, 4, 0)
    assert consistent(whole)
    for reason in (CloseReason.FORCED, CloseReason.FORCED, CloseReason.IDLE_TIMEOUT):
        ended = living.pop()
        ended.force_close(reason)
        counters.count_end(ended)
        now = counters.snapshot(living, shed=3)
        assert consistent(now)
        # Nothing that was counted is forgotten with its connection; what was queued is dropped.
        assert (now.bytes_received, now.bytes_sent, now.pauses) == (10, 100, 4)
        assert now.buffered == 200 * len(living)
    assert dict(now.closed) == {CloseReason.FORCED: 2, CloseReason.IDLE_TIMEOUT: 1}
    assert now.shed == 3
    living[0].force_close()


async def test_a_snapshot_does_not_change() -> None:
    """What was given out is neither changed by what comes nor a way to change the counters."""
    counters = ServerCounters()
    counters.rejected["connections"] += 1
    before = counters.snapshot([], shed=0)
    with pytest.raises(TypeError):
        before.closed[CloseReason.FORCED] = 5  # type: ignore[index]
    conn, _ = simulated()
    counters.opened += 1
    conn.force_close()
    counters.count_end(conn)
    counters.rejected["connections"] += 1
    assert dict(before.closed) == {}
    assert dict(before.rejected) == {"connections": 1}
    assert dict(counters.snapshot([], shed=0).rejected) == {"connections": 2}
