"""TlsOutput: what goes out, whatever the kernel takes of it, and what counts as sent."""

from __future__ import annotations

import errno
import ssl

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.simulated import simulated
from tests.tls import TlsPeer, server_context, simulated_tls, versions
from trioreactor import CloseReason, SendBufferFull, TcpConnection, Timeouts, Watermarks

settled = trio.testing.wait_all_tasks_blocked

SOME = bytes(range(256)) * 1000


async def take_in_steps(conn: TcpConnection, peer: TlsPeer, step: int) -> bytes:
    """What the peer receives, which takes so many bytes at a time; each time checks the counts."""
    got = b""
    while conn.buffered:
        peer.sock.peer_takes(step)
        await settled()
        got += peer.received()
        # Never ahead of the kernel, and at most a record's overhead behind what has come whole.
        sent = conn.statistics().bytes_sent
        assert len(got) <= sent + 1
    return got


@pytest.mark.parametrize("step", [1000, 16406, 100_000])
@versions
async def test_whatever_the_kernel_takes(version: ssl.TLSVersion, step: int) -> None:
    """It arrives in order, once, and the queue is empty when the kernel has the last byte."""
    conn, peer = await simulated_tls(version)
    peer.sock.room = 0
    conn.send(b"small")
    conn.send(SOME)
    conn.send(b"last")
    assert conn.buffered == len(SOME) + 9
    assert await take_in_steps(conn, peer, step) == b"small" + SOME + b"last"
    assert conn.statistics().bytes_sent == len(SOME) + 9
    conn.force_close()


async def test_the_last_byte_counts_last() -> None:
    """Nothing is drained while a byte of ciphertext waits."""
    conn, peer = await simulated_tls()
    peer.sock.room = 0
    conn.send(b"x" * 100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.wait_drained)
        await settled()
        # A record of TLS 1.3 is 22 bytes longer than what is in it.
        peer.sock.peer_takes(121)
        await settled()
        assert conn.buffered == 1
        assert peer.received() == b""
        peer.sock.peer_takes(1)
    assert conn.buffered == 0
    assert peer.received() == b"x" * 100
    conn.force_close()


async def test_small_ones_share_a_record() -> None:
    """What is sent in a callback, or waits in a row, is one record in one write."""
    conn, peer = await simulated_tls()
    peer.sock.room = 0
    for _ in range(100):
        conn.send(b"y" * 600)
    peer.sock.writes.clear()
    peer.sock.peer_takes(1 << 20)
    await settled()
    assert peer.received() == b"y" * 60000
    # The first, which was encrypted when it found no room; the others as gather writes.
    assert len(peer.sock.writes) == 3
    conn.force_close()


async def test_a_megabyte_goes_in_turns() -> None:
    """A kernel that is never full gets it all, though a turn writes only a part."""
    conn, peer = await simulated_tls()
    data = SOME * 8
    assert not conn.send(data)
    assert 0 < conn.buffered < len(data)
    await conn.wait_drained()
    assert peer.received() == data
    assert max(size for _, size in peer.sock.writes) < 70_000
    conn.force_close()


async def test_memory() -> None:
    """Promise M. What waits encrypted beside the queue is bounded."""
    conn, peer = await simulated_tls()
    peer.sock.room = 0
    conn.send(SOME * 8)
    tls = conn._life.tls
    assert tls is not None
    assert len(tls._output) + tls._outgoing.pending < 66_000
    conn.force_close()
    assert not tls._output


async def test_eof_follows_the_data() -> None:
    """Our close_notify is behind what is queued, and the socket's EOF behind it."""
    conn, peer = await simulated_tls()
    peer.sock.room = 0
    conn.send(b"z" * 1000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.send_eof)
        await settled()
        # The data, and not yet the close_notify.
        peer.sock.peer_takes(1022)
        await settled()
        assert conn.buffered == 0
        assert peer.received() == b"z" * 1000
        assert not peer.sock.shut
        peer.sock.peer_takes(1000)
    assert peer.sock.shut
    assert peer.received() == b""
    assert peer.tls.read(1) == b""
    conn.force_close()


async def test_what_is_encrypted_is_not_dropped() -> None:
    """Of offered messages, the one that is half on its way stays; only those behind it may go."""
    conn, peer = await simulated_tls(watermarks=Watermarks(high=2000, low=500, limit=4000))
    peer.sock.room = 0
    messages = [bytes([letter]) * (900 + letter) for letter in b"abcdef"]
    for message in messages:
        conn.offer(message, "drop_oldest")
    dropped = conn.statistics().dropped
    assert 0 < dropped < 5
    peer.sock.peer_takes(1 << 20)
    await settled()
    assert peer.received() == b"".join([messages[0], *messages[1 + dropped :]])
    conn.force_close()


async def test_some_of_several_messages_is_encrypted() -> None:
    """The same where a gather write has taken several of them."""
    conn, peer = await simulated_tls(watermarks=Watermarks(high=2000, low=500, limit=4500))
    peer.sock.room = 0
    messages = [bytes([letter]) * (900 + letter) for letter in b"abcdef"]
    conn.send(b"0" * 10)
    conn.offer(messages[0], "drop_oldest")
    conn.offer(messages[1], "drop_oldest")
    # The first one goes, and the others are encrypted with no room for them.
    peer.sock.peer_takes(40)
    await settled()
    for message in messages[2:]:
        conn.offer(message, "drop_oldest")
    dropped = conn.statistics().dropped
    assert 0 < dropped < 4
    peer.sock.peer_takes(1 << 20)
    await settled()
    stayed = [*messages[:2], *messages[2 + dropped :]]
    assert peer.received() == b"0" * 10 + b"".join(stayed)
    conn.force_close()


async def test_hard_limit() -> None:
    """A sender that does not look loses the connection, as in the open."""
    conn, peer = await simulated_tls(watermarks=Watermarks(high=2000, low=500, limit=100_000))
    peer.sock.room = 0
    with pytest.raises(SendBufferFull):
        for _ in range(100):
            conn.send(b"x" * 5000)
    assert conn.close_reason is CloseReason.SLOW_CONSUMER


async def test_streamed_slices() -> None:
    """`send_all` of more than the limit."""
    conn, peer = await simulated_tls(watermarks=Watermarks(high=2000, low=500, limit=50_000))
    await conn.send_all(SOME)
    assert peer.received() == SOME
    conn.force_close()


async def test_a_peer_that_drips_is_not_stalled(autojump_clock: MockClock) -> None:
    """Progress counts byte by byte, not by whole records: neither deadline passes."""
    timeouts = Timeouts(write_stall=1, linger=1)
    marks = Watermarks(high=1000, low=100)
    conn, peer = await simulated_tls(timeouts=timeouts, watermarks=marks)
    peer.sock.room = 0
    conn.send(b"x" * 16384)

    async def drip() -> None:
        while not peer.sock.closed:
            await trio.sleep(0.5)
            peer.sock.peer_takes(500)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drip)
        await conn.aclose()
    assert conn.close_reason is CloseReason.LOCAL_CLOSE
    assert peer.received() == b"x" * 16384


@pytest.mark.parametrize("queued", [0, 1000], ids=["close_notify", "data"])
async def test_a_peer_that_takes_nothing(autojump_clock: MockClock, queued: int) -> None:
    """A close has an end (D), also where only close_notify waits."""
    conn, peer = await simulated_tls(timeouts=Timeouts(linger=1))
    peer.sock.room = 0
    if queued:
        conn.send(b"x" * queued)
    with trio.fail_after(3):
        await conn.aclose()
    reason = CloseReason.WRITE_STALLED if queued else CloseReason.LOCAL_CLOSE
    assert conn.close_reason is reason


async def test_close_notify_that_waits() -> None:
    """`aclose` waits until the kernel has it."""
    conn, peer = await simulated_tls()
    peer.sock.room = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.aclose)
        await settled()
        assert not peer.sock.closed
        peer.sock.peer_takes(1000)
    assert peer.received() == b""
    assert peer.tls.read(1) == b""


async def test_an_eof_that_has_gone_is_not_stalled(autojump_clock: MockClock) -> None:
    """The deadline ends with what it was for, also where that was close_notify."""
    conn, peer = await simulated_tls(timeouts=Timeouts(write_stall=1))
    peer.sock.room = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.send_eof)
        await trio.sleep(0.5)
        peer.sock.peer_takes(1000)
    await trio.sleep(5)
    assert conn.close_reason is None
    conn.force_close()


async def test_write_stall(autojump_clock: MockClock) -> None:
    """The deadline for queued data counts ciphertext that waits."""
    conn, peer = await simulated_tls(timeouts=Timeouts(write_stall=1))
    peer.sock.room = 0
    conn.send(b"x")
    await trio.sleep(3)
    assert conn.close_reason is CloseReason.WRITE_STALLED


async def test_a_write_that_fails() -> None:
    """Whoever sends hears of it, and so does who reads."""
    conn, peer = await simulated_tls()
    peer.sock.peer_resets()
    with pytest.raises(trio.BrokenResourceError):
        conn.send(b"x")
    with pytest.raises(trio.BrokenResourceError):
        await conn.receive_some()


async def test_what_tls_itself_sends_may_fail() -> None:
    """Session tickets that find a reset are nobody's error, but the EOF read after them is none,
    for the kernel tells only once what it was.
    """
    conn, sock = simulated()
    peer = TlsPeer(sock)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def begin() -> None:
            await conn.start_tls(server_context(), server_side=True, https_compatible=True)

        await peer.shake_hands()
        sock.error, sock.dead = errno.ECONNRESET, True
    with pytest.raises(trio.BrokenResourceError):
        await conn.receive_some()


@pytest.mark.parametrize("take", [0, 30, 1 << 20])
async def test_write_complete(take: int) -> None:
    """Is told when the kernel has all of it."""
    conn, peer = await simulated_tls()
    peer.sock.room = 0
    told: list[int] = []
    conn.write_complete_callback = lambda conn: told.append(conn.buffered)
    conn.send(b"x" * 100)
    if take:
        peer.sock.peer_takes(take)
    await settled()
    assert told == ([0] if take > 130 else [])
    conn.force_close()
