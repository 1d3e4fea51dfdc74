"""WriteQueue: what is sent leaves once and in order, gathered while corked, within its marks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from tests.conftest import Pair, everything
from tests.simulated import simulated
from trioreactor import ConnectionState, Watermarks

settled = trio.testing.wait_all_tasks_blocked
MakePair = Callable[..., Awaitable[Pair]]


@pytest.mark.parametrize(
    "pieces", [[b"one"], [b"one", b"two"], [b"a" * 600, b"", b"b" * 600, b"c"], [b"x"] * 1000]
)
async def test_what_is_corked_leaves_together(pieces: list[bytes]) -> None:
    """Nothing leaves before `uncork`, and then all of it, in order, in one call."""
    conn, sock = simulated()
    conn.cork()
    for piece in pieces:
        assert conn.send(piece)
    whole = b"".join(pieces)
    assert (sock.writes, conn.buffered) == ([], len(whole))
    conn.uncork()
    assert bytes(sock.output) == whole
    assert (len(sock.writes), conn.buffered) == (1, 0)
    # From here on each send is a write again.
    conn.send(b"next")
    assert len(sock.writes) == 2
    conn.force_close()


async def test_a_cork_that_nobody_takes_out() -> None:
    """What is gathered leaves in the loop's next turn at the latest."""
    conn, sock = simulated()
    conn.cork()
    conn.send(b"one")
    conn.cork()
    conn.send(b"two")
    assert not sock.output
    await settled()
    assert bytes(sock.output) == b"onetwo"
    assert len(sock.writes) == 1
    conn.send(b"three")
    assert bytes(sock.output) == b"onetwothree"
    conn.force_close()


async def test_corking_and_uncorking_nothing() -> None:
    """Both are idempotent and write nothing of their own, whatever the state."""
    conn, sock = simulated(room=2)
    conn.uncork()
    for _ in range(2):
        conn.cork()
    for _ in range(2):
        conn.uncork()
    conn.send(b"abcd")
    for _ in range(2):
        conn.cork()
        conn.uncork()
    assert (bytes(sock.output), conn.buffered) == (b"ab", 2)
    conn.force_close()
    conn.cork()
    conn.uncork()
    await settled()
    assert bytes(sock.output) == b"ab"


async def test_gathering_crosses_no_mark_that_writing_avoids() -> None:
    """More than the high mark and the limit is sent while corked: the kernel has room, so nothing
    is congested, and nobody is told that it was.
    """
    conn, sock = simulated(watermarks=Watermarks(high=1000, low=100, limit=2000))
    told: list[int] = []
    conn.high_water_mark_callback = lambda _conn, size: told.append(size)
    conn.cork()
    pieces = [bytes(1500), *[bytes([i]) * 700 for i in range(20)]]
    for piece in pieces:
        assert conn.send(piece)
        assert conn.buffered <= 1000
    conn.uncork()
    await settled()
    assert bytes(sock.output) == b"".join(pieces)
    assert (told, conn.statistics().pauses) == ([], 0)
    conn.force_close()


async def test_what_is_corked_comes_behind_what_waits() -> None:
    """On a full connection the order stays: what waited, what was gathered, what came after."""
    conn, sock = simulated(room=0)
    conn.send(b"waits ")
    conn.cork()
    conn.send(b"gathered ")
    conn.uncork()
    conn.send(b"after")
    sock.peer_takes(1000)
    await settled()
    assert bytes(sock.output) == b"waits gathered after"
    conn.force_close()


async def test_uncorking_on_a_broken_connection() -> None:
    """It never raises: whoever sends next hears of it, and what was gathered is dropped."""
    conn, sock = simulated()
    sock.peer_sends(b"unread")
    await settled()
    conn.cork()
    conn.send(b"too late")
    sock.peer_resets()
    conn.uncork()
    assert conn.buffered == 0
    with pytest.raises(trio.BrokenResourceError):
        conn.send(b"x")
    conn.force_close()


@pytest.mark.parametrize("how", ["send_all", "wait_drained", "send_eof", "shutdown", "aclose"])
async def test_who_waits_or_ends_takes_the_cork_out(how: str, make_pair: MakePair) -> None:
    """What was gathered leaves before anything that comes after it, the EOF among that."""
    peer, conn = await make_pair()
    conn.cork()
    conn.send(b"gathered")
    if how == "send_all":
        await conn.send_all(b" and more")
        assert conn.buffered == 0
    elif how == "wait_drained":
        await conn.wait_drained()
        assert conn.buffered == 0
    elif how == "send_eof":
        await conn.send_eof()
    elif how == "shutdown":
        conn.shutdown()
    await conn.aclose()
    wanted = b"gathered and more" if how == "send_all" else b"gathered"
    stream, rest = peer.detach()
    async with stream:
        assert rest + await everything(stream) == wanted


async def test_a_forced_close_drops_what_is_corked() -> None:
    """Closed by force, nothing gathered leaves any more, in no later turn either."""
    conn, sock = simulated()
    conn.cork()
    conn.send(b"secret")
    conn.force_close()
    conn.uncork()
    await settled()
    assert not sock.output
    assert (conn.state, conn.buffered) == (ConnectionState.DISCONNECTED, 0)


@pytest.mark.parametrize(
    ("limit", "size", "takes"), [(None, 1 << 40, True), (2000, 937, True), (2000, 938, False)]
)
async def test_takes(limit: int | None, size: int, takes: bool) -> None:
    """What `takes` promises `send` keeps: no congestion before it, and no limit passed by it."""
    conn, sock = simulated(room=0, watermarks=Watermarks(high=999, low=10, limit=limit))
    conn.send(bytes(935))
    assert conn.takes(size) is takes
    assert conn.takes(2000 - 64 + 1), "it can never have room: nothing to wait for"
    if takes and size < 2000:
        conn.send(bytes(size))
        assert conn.state is ConnectionState.CONNECTED
        assert conn.congested
        assert not conn.takes(0)
        sock.peer_takes(935 + size - 10)
        await settled()
        assert conn.takes(0)
    conn.force_close()
