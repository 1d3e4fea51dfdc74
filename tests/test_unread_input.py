"""UnreadInput: what there is to read, who reads, and the end, seen without reading."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from tests.conftest import Pair, reset, tcp_pair, until
from tests.simulated import simulated
from trioreactor import Buffer, CloseReason, TcpConnection

settled = trio.testing.wait_all_tasks_blocked
MakePair = Callable[..., Awaitable[Pair]]


def leave(_conn: TcpConnection, _buffer: Buffer) -> None:
    """A callback that consumes nothing."""


async def test_who_reads(make_pair: MakePair) -> None:
    """`busy` is one who waits for input, `dispatching` a callback, `delivering` one not paused."""
    peer, conn = await make_pair()
    read = conn._read

    def state() -> tuple[bool, bool, bool]:
        return read.busy, read.dispatching, read.delivering

    assert state() == (False, False, False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.receive_some)
        await settled()
        assert state() == (True, False, False)
        nursery.cancel_scope.cancel()
    assert state() == (False, False, False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, leave)
        await settled()
        assert state() == (True, True, True)
        conn.stop_reading()
        # Paused, it finds neither an error nor an EOF.
        assert state() == (False, True, False)
        conn.start_reading()
        assert state() == (True, True, True)
        nursery.cancel_scope.cancel()
    assert state() == (False, False, False)
    await peer.aclose()
    await conn.aclose()


async def test_what_there_is(make_pair: MakePair) -> None:
    """Input in the kernel, and what a callback left, is unread; an EOF is nothing to read."""
    peer, conn = await make_pair()
    assert not conn.has_unread()
    await peer.send_all(b"abc")
    await until(conn.has_unread)
    assert await conn.receive_some() == b"abc"
    assert not conn.has_unread()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, leave)
        await peer.send_all(b"left")
        await until(lambda: conn._read.buffer.size)
        assert conn.has_unread()
        nursery.cancel_scope.cancel()
    assert conn.has_unread()
    assert await conn.receive_some() == b"left"
    await peer.send_eof()
    await settled(0.01)
    assert not conn.has_unread()
    assert await conn.receive_some() == b""
    await peer.aclose()
    await conn.aclose()
    assert not conn.has_unread()


async def test_what_there_is_more(make_pair: MakePair) -> None:
    """`has_more` leaves out what a running callback has been given, but not while it is paused, and
    never what is in the kernel.
    """
    peer, conn = await make_pair()
    read = conn._read
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, leave)
        await peer.send_all(b"left")
        await until(lambda: read.buffer.size == 4)
        assert (read.has_unread(), read.has_more()) == (True, False)
        conn.stop_reading()
        assert read.has_more()
        conn.start_reading()
        await settled()
        assert not read.has_more()
        # It comes while the loop is elsewhere.
        peer._sock.send(b"more")
        assert read.has_more()
        nursery.cancel_scope.cancel()
    assert read.has_more()
    await peer.aclose()
    conn.force_close()


async def test_a_broken_connection_has_nothing() -> None:
    """After a reset with nothing before it there is nothing to read, and asking raises nothing."""
    peer, conn = await tcp_pair()
    stream, _ = peer.detach()
    reset(stream.socket)
    await settled(0.01)
    assert not conn.has_unread()
    assert not conn._read.has_more()
    conn.force_close()


async def test_the_end_behind_input() -> None:
    """One who watches hears of the EOF when it is next to be read, not while input is before it."""
    conn, sock = simulated()
    seen: list[bytes | str] = []
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def watch() -> None:
            await conn.wait_eof()
            seen.append("eof")

        await settled()
        sock.peer_sends(b"abcd")
        sock.peer_ends()
        await settled()
        assert seen == []
        seen.append(await conn.receive_some(2))
        await settled()
        assert seen == [b"ab"]
        seen.append(await conn.receive_some(2))
        await settled()
    assert seen == [b"ab", b"cd", "eof"]
    assert await conn.receive_some() == b""
    conn.force_close()


async def test_an_event_for_a_former_descriptor() -> None:
    """A readable event with nothing behind it is no end, nor is one that speaks of an error."""
    conn, sock = simulated()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.wait_eof)
        await settled()
        for failed in (False, True):
            sock._poller.happen(sock.fileno(), readable=True, failed=failed)
            await settled()
            assert nursery.child_tasks
            assert conn.close_reason is None
        sock.peer_ends()
    conn.force_close()


async def test_an_eof_after_a_reset_is_none() -> None:
    """Where a send took the kernel's note of the reset, the EOF that reading meets then is it."""
    conn, sock = simulated()
    sock.peer_sends(b"before")
    await settled()
    sock.peer_resets()
    with pytest.raises(trio.BrokenResourceError):
        conn.send(b"x")
    assert await conn.receive_some() == b"before"
    with pytest.raises(trio.BrokenResourceError):
        await conn.receive_some()
    assert conn.close_reason is CloseReason.PEER_RESET
