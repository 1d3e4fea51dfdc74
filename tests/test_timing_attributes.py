"""TimingAttributes: when data moved, and watches that end with the connection."""

from __future__ import annotations

import math

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.simulated import simulated
from trioreactor import Buffer, CloseReason, TcpConnection, Watermarks

settled = trio.testing.wait_all_tasks_blocked


class Watch:
    """One that counts how often it was stopped."""

    def __init__(self) -> None:
        self.stopped = 0

    def stop(self) -> None:
        """Count."""
        self.stopped += 1


@pytest.mark.parametrize("end", ["force_close", "aclose", "reset", "detach", "limit"])
async def test_watches_are_stopped_at_the_close(end: str) -> None:
    """However a connection ends, each of its watches is stopped once, and not before."""
    conn, sock = simulated(room=0, watermarks=Watermarks(limit=65536))
    watches = [Watch() for _ in range(3)]
    for watch in watches:
        conn.stop_at_close(watch)
    await settled()
    assert [watch.stopped for watch in watches] == [0, 0, 0]
    if end == "force_close":
        conn.force_close()
    elif end == "aclose":
        await conn.aclose()
    elif end == "detach":
        conn._life.detach()
    elif end == "reset":
        sock.peer_resets()
        with pytest.raises(trio.BrokenResourceError):
            await conn.receive_some()
    else:
        with pytest.raises(trio.BrokenResourceError):
            conn.send(bytes(100000))
        assert conn.close_reason is CloseReason.SLOW_CONSUMER
    assert [watch.stopped for watch in watches] == [1, 1, 1]
    conn.force_close()
    assert [watch.stopped for watch in watches] == [1, 1, 1]
    # One that comes too late is stopped at once.
    late = Watch()
    conn.stop_at_close(late)
    assert late.stopped == 1


async def test_times_are_kept_only_on_demand(autojump_clock: MockClock) -> None:
    """Before anybody asked for them they are -inf, whatever moved."""
    conn, sock = simulated()
    sock.peer_sends(b"abc")
    await conn.receive_some()
    conn.send(b"def")
    assert (conn.last_received, conn.last_sent) == (-math.inf, -math.inf)
    conn.force_close()


@pytest.mark.parametrize("corked", [False, True])
async def test_times(corked: bool, autojump_clock: MockClock) -> None:
    """`last_received` follows what is read and `last_sent` what the kernel takes, each its own:
    not what is only queued, and not what the other does. Asking again changes nothing.
    """
    conn, sock = simulated(room=10)
    begin = trio.current_time()
    conn.note_times()
    assert (conn.last_received, conn.last_sent) == (begin, begin)

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        buffer.take()
        if corked:
            conn.send(bytes(10))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, on_message)
        await trio.sleep(1)
        conn.note_times()
        assert (conn.last_received, conn.last_sent) == (begin, begin)
        sock.peer_sends(b"abc")
        await settled()
        if not corked:
            assert (conn.last_received, conn.last_sent) == (begin + 1, begin)
            conn.send(bytes(10))
        assert (conn.last_received, conn.last_sent) == (begin + 1, begin + 1)
        await trio.sleep(1)
        # There is no room for this.
        conn.send(bytes(10))
        await settled()
        assert (conn.last_received, conn.last_sent) == (begin + 1, begin + 1)
        await trio.sleep(1)
        sock.peer_takes(5)
        await settled()
        assert (conn.last_received, conn.last_sent) == (begin + 1, begin + 3)
        nursery.cancel_scope.cancel()
    # Coroutines that read count as well.
    await trio.sleep(1)
    sock.peer_sends(b"abc")
    await conn.receive_some()
    assert (conn.last_received, conn.last_sent) == (begin + 4, begin + 3)
    conn.force_close()
    assert (conn.last_received, conn.last_sent) == (begin + 4, begin + 3)


async def test_has_unread() -> None:
    """It tells of input that waits in the kernel, and takes none of it."""
    conn, sock = simulated()
    assert not conn.has_unread()
    conn.stop_reading()
    sock.peer_sends(b"abc")
    await settled()
    assert conn.has_unread()
    conn.start_reading()
    assert await conn.receive_some() == b"abc"
    assert not conn.has_unread()
    conn.force_close()


async def test_decoded_without_deadlines() -> None:
    """A codec may tell of messages where nobody counts their time."""
    conn, _ = simulated()
    conn.decoded(5, 3)
    conn.force_close()
    conn.decoded(5, 3)
