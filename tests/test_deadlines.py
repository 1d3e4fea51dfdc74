"""Deadlines: each ends its connection in its time and for its reason, and no other connection."""

from __future__ import annotations

import gc
import math
import os
import signal
import socket
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.conftest import (
    address_of,
    fill,
    listening,
    living_tasks,
    no_leaks,
    serving,
    tcp_pair,
    unix_pair,
)
from tests.servers import local
from tests.soak.child import running
from trioreactor import (
    Buffer,
    Callbacks,
    CloseReason,
    ConnectionState,
    FramedChannel,
    LengthHeaderCodec,
    LineCodec,
    TcpClient,
    TcpConnection,
    Timeouts,
)
from trioreactor.default_poller import current_poller
from trioreactor.timing_wheel import tick_of

CODEC = LineCodec()
REASONS = {
    "idle": CloseReason.IDLE_TIMEOUT,
    "first_byte": CloseReason.FIRST_BYTE_TIMEOUT,
    "frame": CloseReason.FRAME_TIMEOUT,
    "write_stall": CloseReason.WRITE_STALLED,
}


NONE = Timeouts()


def pair(timeouts: Timeouts = NONE) -> tuple[TcpConnection, trio.SocketStream]:
    """A connection with deadlines, and its peer, which has none."""
    ours, theirs = trio.socket.socketpair()
    return TcpConnection(trio.SocketStream(ours), timeouts=timeouts), trio.SocketStream(theirs)


async def by_coroutine(conn: TcpConnection) -> None:
    async for _ in conn:
        pass


async def by_dispatch(conn: TcpConnection) -> None:
    await conn.dispatch(lambda _, buffer: buffer.take())


async def by_channel(conn: TcpConnection) -> None:
    async for _ in FramedChannel(conn, CODEC):
        pass


async def by_messages(conn: TcpConnection) -> None:
    await conn.dispatch(CODEC.on_message(lambda _, line: None))


Reader = Callable[[TcpConnection], Awaitable[None]]
READERS = [by_coroutine, by_dispatch, by_channel, by_messages]
FRAMED_READERS = [by_channel, by_messages]


@asynccontextmanager
async def reading(reader: Reader, conn: TcpConnection) -> AsyncIterator[None]:
    """Read from *conn* in the background, until its end or the block's."""

    async def read() -> None:
        with suppress(trio.ClosedResourceError):
            await reader(conn)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


async def end_of(conn: TcpConnection) -> tuple[CloseReason | None, float]:
    """Wait for the end; why and when it came."""
    with trio.fail_after(10_000):
        await conn.wait_closed()
    return conn.close_reason, trio.current_time()


def in_time(at: float, begun: float, seconds: float) -> bool:
    """Whether *at* is not early, and late by less than a tick."""
    return begun + seconds <= at < begun + seconds + tick_of(seconds)


def nothing_is_set() -> bool:
    """Whether no deadline and no timer of this run waits."""
    poller = current_poller()
    return (
        len(poller.wheel) == 0
        and poller.wheel._slots == {}
        and poller._timers.next_deadline() is None
    )


async def provoke(kind: str, conn: TcpConnection, peer: trio.SocketStream) -> None:
    """Do what the deadline of *kind* counts from, now. Input is read by a channel meanwhile."""
    if kind == "frame":
        await peer.send_all(b"begun, and no")
        await trio.testing.wait_all_tasks_blocked()
        assert conn.statistics().bytes_received
    elif kind == "write_stall":
        await fill(conn)


# -- each in its time


@pytest.mark.parametrize("seconds", [0.3, 5.0, 10.1, 1000.0])
@pytest.mark.parametrize("kind", REASONS)
async def test_each_in_its_time(kind: str, seconds: float, autojump_clock: MockClock) -> None:
    """Each ends the connection for its own reason, never early, and late by less than a tick."""
    await trio.sleep(3)
    async with no_leaks():
        conn, peer = pair(Timeouts(**{kind: seconds}))
        async with peer, reading(by_channel, conn):
            if kind not in ("idle", "first_byte"):
                await trio.sleep(50)
            begun = trio.current_time()
            await provoke(kind, conn, peer)
            reason, at = await end_of(conn)
        assert reason is REASONS[kind]
        assert in_time(at, begun, seconds)


@pytest.mark.parametrize("kind", REASONS)
async def test_on_a_server(kind: str, autojump_clock: MockClock) -> None:
    """A server's connections have the server's deadlines: the handler is cancelled, the reason is
    counted, and nothing is logged as its error.
    """
    begun = math.inf
    ended: list[tuple[bool, CloseReason | None, float]] = []

    async def handler(conn: TcpConnection) -> None:
        nonlocal begun
        begun = trio.current_time()
        if kind == "write_stall":
            await fill(conn)
        try:
            async for _ in FramedChannel(conn, CODEC):
                pass
        except trio.Cancelled:
            ended.append((True, conn.close_reason, trio.current_time()))
            raise

    server = local(handler, timeouts=Timeouts(**{kind: 7.0}))
    async with no_leaks(), serving(server) as address:
        with socket.create_connection(address) as client:
            if kind == "frame":
                client.sendall(b"begun")
            await trio.sleep(1000)
    ((cancelled, reason, at),) = ended
    assert cancelled
    assert reason is REASONS[kind]
    # The kernel may take some more a moment later.
    assert in_time(at, begun, 7.0) or (kind == "write_stall" and at >= begun + 7)
    assert server.statistics().closed == {REASONS[kind]: 1}


@pytest.mark.parametrize("kind", REASONS)
async def test_on_a_client(kind: str, autojump_clock: MockClock) -> None:
    """A client's connections have the client's."""
    begun = math.inf
    ended: list[tuple[CloseReason | None, float]] = []

    async def handler(conn: TcpConnection) -> None:
        nonlocal begun
        begun = trio.current_time()
        if kind == "write_stall":
            await fill(conn)
        try:
            async for _ in FramedChannel(conn, CODEC):
                pass
        finally:
            ended.append((conn.close_reason, trio.current_time()))

    async with listening() as listener, no_leaks():
        client = TcpClient(
            *address_of(listener), handler, timeouts=Timeouts(**{kind: 7.0}), retry=False
        )
        async with client, await listener.accept() as peer:
            if kind == "frame":
                await peer.send_all(b"begun")
            await trio.sleep(1000)
    ((reason, at),) = ended
    assert reason is REASONS[kind]
    # The kernel may take some more a moment later.
    assert in_time(at, begun, 7.0) or (kind == "write_stall" and at >= begun + 7)


@pytest.mark.parametrize("kind", REASONS)
async def test_none_means_off(kind: str, autojump_clock: MockClock) -> None:
    """A deadline that is None never comes, whichever others are set."""
    others = {name: 20_000.0 for name in REASONS if name != kind}
    for timeouts in (Timeouts(), Timeouts(**others)):
        conn, peer = pair(timeouts)
        async with peer, conn, reading(by_channel, conn):
            await provoke(kind, conn, peer)
            await trio.sleep(10_000)
            assert conn.state is ConnectionState.CONNECTED
            conn.force_close()


# -- changed while the connection lives


@pytest.mark.parametrize(
    ("before", "after", "end"),
    [(10.0, 4.0, 4.0), (10.0, 20.0, 20.0), (10.0, 1.0, 2.0), (10.0, 10.0, 10.0)],
    ids=["earlier", "later", "passed", "same"],
)
@pytest.mark.parametrize("kind", REASONS)
async def test_changed(
    kind: str, before: float, after: float, end: float, autojump_clock: MockClock
) -> None:
    """Another time holds from when it is set, and what has run already counts. One that has passed
    by then ends the connection soon, not within the assignment.
    """
    conn, peer = pair(Timeouts(**{kind: before}))
    async with peer, reading(by_channel, conn):
        await provoke(kind, conn, peer)
        await trio.sleep(2)
        conn.timeouts = replace(conn.timeouts, **{kind: after})
        assert getattr(conn.timeouts, kind) == after
        assert conn.state is ConnectionState.CONNECTED
        assert await end_of(conn) == (REASONS[kind], end)
    assert nothing_is_set()


@pytest.mark.parametrize("kind", REASONS)
async def test_turned_off_and_on(kind: str, autojump_clock: MockClock) -> None:
    """None turns it off at once; turned on again it comes in its time."""
    conn, peer = pair(Timeouts(**{kind: 10.0}))
    async with peer, reading(by_channel, conn):
        await provoke(kind, conn, peer)
        await trio.sleep(9)
        conn.timeouts = replace(conn.timeouts, **{kind: None})
        assert nothing_is_set()
        await trio.sleep(991)
        assert conn.state is ConnectionState.CONNECTED
        conn.timeouts = replace(conn.timeouts, **{kind: 2000.0})
        # How long the peer has taken nothing is not watched while that is off.
        begun = 1000 if kind == "write_stall" else 0
        assert await end_of(conn) == (REASONS[kind], begun + 2000)


@pytest.mark.parametrize("kind", REASONS)
async def test_turned_on_later(kind: str, autojump_clock: MockClock) -> None:
    """The first deadlines of a connection that had none count from when they are set, also for a
    message that was begun before.
    """
    conn, peer = pair()
    async with peer, reading(by_channel, conn):
        await provoke(kind, conn, peer)
        await trio.sleep(100)
        conn.timeouts = Timeouts(**{kind: 6.0})
        assert await end_of(conn) == (REASONS[kind], 106)


async def test_turned_on_beside_a_known_time(autojump_clock: MockClock) -> None:
    """Turning deadlines on leaves the times that are known already."""
    conn, peer = pair()
    async with peer:
        conn.note_times()
        await trio.sleep(3)
        conn.timeouts = Timeouts(idle=10)
        assert conn.last_received == conn.last_sent == 0
        conn.note_times()
        assert conn.last_received == conn.last_sent == 0
        assert await end_of(conn) == (CloseReason.IDLE_TIMEOUT, 10)


async def test_another_deadline_is_not_touched(autojump_clock: MockClock) -> None:
    """Setting one again and again gives no peer more time for another."""
    conn, peer = pair(Timeouts(write_stall=10))
    async with peer:
        await fill(conn)
        for n in range(20):
            conn.timeouts = replace(conn.timeouts, frame=100.0 + n)
            await trio.sleep(1)
            if conn.close_reason is not None:
                break
        assert conn.close_reason is CloseReason.WRITE_STALLED
        assert 10 <= trio.current_time() <= 11


async def test_changed_in_callbacks(autojump_clock: MockClock) -> None:
    """A callback may change its connection's deadlines, closed or not."""
    changed: list[TcpConnection] = []

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        if buffer.take() == b"close":
            conn.force_close()
        conn.timeouts = Timeouts(idle=4, first_byte=4, frame=4, write_stall=4)
        changed.append(conn)

    for text, reason, end in (
        (b"stay", CloseReason.IDLE_TIMEOUT, 4),
        (b"close", CloseReason.FORCED, 4),
    ):
        conn, peer = pair()
        async with peer, reading(lambda c: c.dispatch(on_message), conn):
            await peer.send_all(text)
            assert await end_of(conn) == (reason, end)
        assert nothing_is_set()
    assert len(changed) == 2


async def test_what_is_no_timeouts_is_refused() -> None:
    """Anything but `Timeouts` is refused, and changes nothing."""
    conn, peer = pair(Timeouts(idle=10))
    async with peer, conn:
        with pytest.raises(TypeError, match=r"pass Timeouts"):
            conn.timeouts = None  # type: ignore[assignment]
        assert conn.timeouts == Timeouts(idle=10)


# -- idleness


@pytest.mark.parametrize("direction", ["in", "out"])
@pytest.mark.parametrize("reader", READERS)
async def test_activity(reader: Reader, direction: str, autojump_clock: MockClock) -> None:
    """Receiving alone and sending alone keep it from being idle, in each mode; then it is."""
    conn, peer = pair(Timeouts(idle=10))
    async with peer, reading(reader, conn):
        for _ in range(12):
            await trio.sleep(9)
            if direction == "in":
                await peer.send_all(b"still here\n")
                await trio.testing.wait_all_tasks_blocked()
            else:
                conn.send(b"still here\n")
        last = trio.current_time()
        reason, at = await end_of(conn)
    assert reason is CloseReason.IDLE_TIMEOUT
    assert in_time(at, last, 10)


async def test_sending_through_a_channel(autojump_clock: MockClock) -> None:
    """What a channel sends is activity, though nobody receives."""
    conn, peer = pair(Timeouts(idle=10))
    channel = FramedChannel(conn, CODEC)
    async with peer:
        for _ in range(12):
            await trio.sleep(9)
            await channel.send("still here")
        assert await end_of(conn) == (CloseReason.IDLE_TIMEOUT, 118)


async def test_a_queue_that_moves_is_not_idle(autojump_clock: MockClock) -> None:
    """What the kernel takes of what was queued long ago is activity; queueing alone is not."""
    conn, peer = pair(Timeouts(idle=10))
    async with peer:
        conn.send(bytes(1 << 23))
        queued = conn.buffered
        for _ in range(3):
            await trio.sleep(9)
            while conn.buffered == queued:
                await peer.receive_some(65536)
                await trio.testing.wait_all_tasks_blocked()
            queued = conn.buffered
            assert queued
        await trio.sleep(5)
        conn.send(b"more")
        assert await end_of(conn) == (CloseReason.IDLE_TIMEOUT, 37)


# -- messages


@pytest.mark.parametrize("reader", FRAMED_READERS)
async def test_a_slow_drip(reader: Reader, autojump_clock: MockClock) -> None:
    """FAULTS 12: a byte a second is no progress, and the deadline counts from the first byte."""
    conn, peer = pair(Timeouts(frame=5))
    async with peer, reading(reader, conn), trio.open_nursery() as nursery:
        await trio.sleep(50)

        async def drip() -> None:
            with suppress(trio.BrokenResourceError):
                await peer.send_all(b"n")
                # No byte comes just when the deadline does: it would be looked at first.
                await trio.sleep(0.5)
                for byte in b"ever complete":
                    await peer.send_all(bytes([byte]))
                    await trio.sleep(1)

        nursery.start_soon(drip)
        assert await end_of(conn) == (CloseReason.FRAME_TIMEOUT, 55)


async def test_a_shorter_idle_with_unread_input(autojump_clock: MockClock) -> None:
    """A deadline that a change has passed has not come late: nothing suggests that the loop was
    away, and what a user leaves unread is no sign of life for ever.
    """
    conn, peer = pair(Timeouts(idle=100))
    async with peer:
        await peer.send_all(b"unread")
        await trio.sleep(50)
        conn.timeouts = Timeouts(idle=10)
        reason, at = await end_of(conn)
        assert reason is CloseReason.IDLE_TIMEOUT
        assert in_time(at, 40, 10)


@pytest.mark.parametrize("reader", FRAMED_READERS)
async def test_a_shorter_deadline_inside_a_message(
    reader: Reader, autojump_clock: MockClock
) -> None:
    """What has passed of a message counts: a deadline of less than that ends it at once."""
    conn, peer = pair(Timeouts(frame=30))
    async with peer, reading(reader, conn):
        await peer.send_all(b"no end")
        await trio.sleep(3)
        conn.timeouts = Timeouts(frame=2)
        reason, at = await end_of(conn)
        assert reason is CloseReason.FRAME_TIMEOUT
        assert in_time(at, 1, 2)


@pytest.mark.parametrize("reader", FRAMED_READERS)
async def test_a_fast_drip(reader: Reader) -> None:
    """A byte a millisecond is none, either, though the reader is awake whenever one looks."""
    conn, peer = pair(Timeouts(frame=0.2))

    def drip(sock: socket.socket) -> None:
        """In a thread: a task of this loop would not send while the loop looks."""
        with sock, suppress(OSError):
            for _ in range(3000):
                sock.send(b"n")
                time.sleep(0.001)

    async with reading(reader, conn), trio.open_nursery() as nursery:
        nursery.start_soon(
            trio.to_thread.run_sync, drip, socket.socket(fileno=os.dup(peer.socket.fileno()))
        )
        await peer.aclose()
        await conn.wait_closed()
        assert conn.close_reason is CloseReason.FRAME_TIMEOUT
        # 200 are the whole time.
        assert conn.statistics().bytes_received < 1000


@pytest.mark.parametrize("reader", FRAMED_READERS)
async def test_each_message_has_its_own(reader: Reader, autojump_clock: MockClock) -> None:
    """A complete message and the beginning of another begin a new deadline."""
    conn, peer = pair(Timeouts(frame=5))
    async with peer, reading(reader, conn):
        for _ in range(10):
            await peer.send_all(b"end\nbegin")
            await trio.sleep(4)
        assert await end_of(conn) == (CloseReason.FRAME_TIMEOUT, 41)


@pytest.mark.parametrize("reader", FRAMED_READERS)
async def test_between_messages(reader: Reader, autojump_clock: MockClock) -> None:
    """No deadline counts before the first message, nor between two, however they were cut."""
    conn, peer = pair(Timeouts(frame=5))
    async with peer, reading(reader, conn):
        await trio.sleep(100)
        await peer.send_all(b"in one piece\n")
        await trio.sleep(100)
        await peer.send_all(b"in ")
        await trio.sleep(4)
        await peer.send_all(b"two\n")
        await trio.sleep(100)
        await peer.send_all(b"no end")
        assert await end_of(conn) == (CloseReason.FRAME_TIMEOUT, 309)


@pytest.mark.parametrize(
    "beginning", [b"\0", b"\0\0\0\5", b"\0\0\0\5abcd"], ids=["header", "no body", "body"]
)
async def test_a_header_counts(beginning: bytes, autojump_clock: MockClock) -> None:
    """A message is begun with its first byte, be it one of the length header's."""
    conn, peer = pair(Timeouts(frame=5))
    codec = LengthHeaderCodec()
    async with (
        peer,
        reading(lambda c: c.dispatch(codec.on_message(lambda _, message: None)), conn),
    ):
        await peer.send_all(b"\0\0\0\3abc" + beginning)
        assert await end_of(conn) == (CloseReason.FRAME_TIMEOUT, 5)


async def test_a_slow_user(autojump_clock: MockClock) -> None:
    """The peer does not pay for a user that is slow: the rest of the message has come. Once it is
    read, and is not the end, the deadline counts again.
    """
    conn, peer = pair(Timeouts(frame=5))
    channel = FramedChannel(conn, CODEC)
    async with peer:
        await peer.send_all(b"one\ntw")
        assert await channel.receive() == "one"
        await peer.send_all(b"o\n")
        await trio.sleep(100)
        assert await channel.receive() == "two"
        await peer.send_all(b"three\nfo")
        assert await channel.receive() == "three"
        await peer.send_all(b"u")
        await trio.sleep(100)
        with pytest.raises(trio.ClosedResourceError):
            await channel.receive()
        assert conn.close_reason is CloseReason.FRAME_TIMEOUT
        assert 200 <= trio.current_time() <= 210


async def turns_until(condition: Callable[[], bool]) -> None:
    """Wait for something real while the mock clock stands still."""
    for _ in range(1_000_000):
        if condition():
            return
        await trio.lowlevel.checkpoint()
    raise AssertionError


async def test_a_paused_dispatch(autojump_clock: MockClock) -> None:
    """While a dispatch is paused no message is expected to become complete."""
    conn, peer = pair(Timeouts(frame=5))
    lines: list[str] = []
    async with peer:
        on_message = CODEC.on_message(lambda _, line: lines.append(line))
        async with reading(lambda c: c.dispatch(on_message), conn):
            await peer.send_all(b"one\ntw")
            await turns_until(lambda: len(lines) == 1)
            conn.stop_reading()
            await trio.sleep(100)
            assert conn.state is ConnectionState.CONNECTED
            conn.start_reading()
            await peer.send_all(b"o\n")
            await turns_until(lambda: len(lines) == 2)
            assert lines == ["one", "two"]
        conn.force_close()


@pytest.mark.parametrize("reader", FRAMED_READERS)
async def test_pauses_do_not_make_a_drip_younger(reader: Reader, autojump_clock: MockClock) -> None:
    """A pause stops a message's time and does not begin it anew: a drip has no more of it."""
    conn, peer = pair(Timeouts(frame=5))
    async with peer, reading(reader, conn):
        dripped = 0
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while dripped < 60:
                await peer.send_all(b"x")
                dripped += 1
                await trio.sleep(0.9)
                conn.stop_reading()
                conn.stop_reading()
                await trio.sleep(10)
                conn.start_reading()
                conn.start_reading()
        assert conn.close_reason is CloseReason.FRAME_TIMEOUT
        assert dripped == 6


async def test_a_pause_before_the_deadlines(autojump_clock: MockClock) -> None:
    """Deadlines that are set in a pause begin after it."""
    conn, peer = pair()
    lines: list[str] = []
    on_message = CODEC.on_message(lambda _, line: lines.append(line))
    async with peer, reading(lambda c: c.dispatch(on_message), conn):
        await peer.send_all(b"one\ntw")
        await turns_until(lambda: len(lines) == 1)
        conn.stop_reading()
        conn.timeouts = Timeouts(frame=5)
        await trio.sleep(100)
        assert conn.state is ConnectionState.CONNECTED
        begun = trio.current_time()
        conn.start_reading()
        reason, at = await end_of(conn)
        assert reason is CloseReason.FRAME_TIMEOUT
        assert in_time(at, begun, 5)


async def test_whole_messages_that_wait_are_no_frame(autojump_clock: MockClock) -> None:
    """Messages that wait complete for a slow user are not late, however many came together."""
    conn, peer = pair(Timeouts(frame=5))
    channel = FramedChannel(conn, CODEC)
    number = 300
    async with peer:
        await peer.send_all(b"whole\n" * number)
        for _ in range(number):
            assert await channel.receive() == "whole"
            await trio.sleep(1)
        await channel.aclose()


# -- the first byte


async def test_a_first_byte_that_nobody_has_read(autojump_clock: MockClock) -> None:
    """A peer that has spoken in time is not closed because the handler has not listened yet."""
    conn, peer = pair(Timeouts(first_byte=5))
    async with peer, conn:
        await peer.send_all(b"x")
        await trio.sleep(100)
        assert await conn.receive_some() == b"x"
        assert nothing_is_set()


@pytest.mark.parametrize("reader", READERS)
async def test_after_the_first_byte(reader: Reader, autojump_clock: MockClock) -> None:
    """Once a byte has come the deadline is over, for good."""
    conn, peer = pair(Timeouts(first_byte=5))
    async with peer, conn, reading(reader, conn):
        await trio.sleep(4)
        await peer.send_all(b"x")
        await trio.sleep(100)
        conn.timeouts = replace(conn.timeouts, first_byte=6)
        await trio.sleep(100)
        assert conn.state is ConnectionState.CONNECTED
        conn.force_close()


# -- the end

ALL = Timeouts(idle=10, first_byte=20, frame=5, write_stall=15)


async def detach(conn: TcpConnection) -> None:
    stream, _ = conn.detach()
    await stream.aclose()


async def force_close(conn: TcpConnection) -> None:
    conn.force_close()


async def aclose(conn: TcpConnection) -> None:
    await conn.aclose()


async def by_deadline(conn: TcpConnection) -> None:
    await conn.wait_closed()


async def cancelled(conn: TcpConnection) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await conn.aclose()


@pytest.mark.parametrize("end", [detach, force_close, aclose, by_deadline, cancelled])
async def test_nothing_comes_after_the_end(
    end: Callable[[TcpConnection], Awaitable[None]], autojump_clock: MockClock
) -> None:
    """However a connection ends, none of its deadlines and timers is left, no task, and nothing
    that holds it.
    """
    others = await unix_pair()
    async with no_leaks():
        conn, peer = pair(ALL)
        async with peer:
            channel = FramedChannel(conn, CODEC)
            await peer.send_all(b"one\ntw")
            assert await channel.receive() == "one"
            await trio.sleep(4)
            assert not nothing_is_set()
            await end(conn)
            reason = conn.close_reason
            assert nothing_is_set()
            conn.timeouts = Timeouts(idle=1, first_byte=1, frame=1, write_stall=1)
            assert conn.timeouts.idle == 1
            conn.decoded(1, 1)
            assert nothing_is_set()
            await trio.sleep(100)
            assert conn.close_reason is reason
            assert conn._life.watches.deadlines is None
    for other in others:
        other.force_close()


async def test_nothing_is_left_for_the_collector(autojump_clock: MockClock) -> None:
    """A closed connection that had deadlines is freed at once, and so is what ran them."""
    gc.collect()
    gc.disable()
    try:
        conn, peer = pair(ALL)
        poller = weakref.ref(current_poller())
        gone = weakref.ref(conn)
        conn.decoded(0, 1)
        await trio.sleep(4)
        await peer.aclose()
        await conn.aclose()
        del conn
        await trio.sleep(1)
        assert gone() is None
        assert poller() is None
    finally:
        gc.enable()


async def test_two_at_the_same_moment(autojump_clock: MockClock) -> None:
    """When two come at the same moment the connection is closed once, for the first's reason."""
    conn, peer = pair(Timeouts(idle=10, first_byte=10, frame=10))
    async with peer, reading(by_channel, conn):
        assert await end_of(conn) == (CloseReason.IDLE_TIMEOUT, 10)
        assert nothing_is_set()


async def test_one_closes_another_at_the_same_moment(autojump_clock: MockClock) -> None:
    """What is called at a moment may close a connection whose deadline is that moment, too."""
    first, first_peer = pair(Timeouts(idle=20))
    current_poller().wheel.add(10, tick_of(10), lambda: second.force_close())
    second, second_peer = pair(Timeouts(idle=10))
    async with first_peer, second_peer, first:
        assert await end_of(second) == (CloseReason.FORCED, 10)
        await trio.sleep(5)
        first.force_close()
        assert nothing_is_set()


async def test_a_handler_that_closes_in_the_same_moment(autojump_clock: MockClock) -> None:
    """Whoever is awake at the moment of the deadline may close, too: the first reason stays."""
    conn, peer = pair(Timeouts(idle=10))
    async with peer:
        await trio.sleep(10)
        conn.force_close()
        await trio.sleep(1)
        assert conn.close_reason in (CloseReason.FORCED, CloseReason.IDLE_TIMEOUT)
        assert nothing_is_set()


async def test_a_crowd_at_one_moment(autojump_clock: MockClock) -> None:
    """Hundreds whose deadline is the same moment are closed then, each of them, with one timer."""
    number = 300
    async with no_leaks():
        pairs = [pair(Timeouts(idle=10)) for _ in range(number)]
        assert len(current_poller().wheel) == number
        assert len(current_poller().wheel._slots) == 1
        tasks = living_tasks()
        await trio.sleep(9)
        assert living_tasks() <= tasks + 1
        ends = []
        for conn, peer in pairs:
            ends.append(await end_of(conn))
            peer.socket.close()
        assert ends == [(CloseReason.IDLE_TIMEOUT, 10)] * number


# -- the loop was away (FAULTS 57)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["idle", "first_byte", "frame"])
async def test_what_came_while_the_loop_was_away(
    kind: str, reader: Reader, mock_clock: MockClock
) -> None:
    """After the process was stopped for long, whoever has sent meanwhile is not timed out for it,
    of however many; whoever has not is.
    """
    if kind == "frame" and reader not in FRAMED_READERS:
        pytest.skip("messages are not known")
    sent, silent = 300, 20
    async with trio.open_nursery() as nursery:
        pairs = [pair(Timeouts(**{kind: 10})) for _ in range(sent + silent)]
        for conn, peer in pairs:

            async def read(conn: TcpConnection = conn) -> None:
                with suppress(trio.ClosedResourceError):
                    await reader(conn)

            nursery.start_soon(read)
            if kind == "frame":
                peer.socket._sock.send(b"begun")
        await trio.testing.wait_all_tasks_blocked(0.05)
        mock_clock.jump(12 if kind == "frame" else 30)
        for _, peer in pairs[:sent]:
            peer.socket._sock.send(b", ended\n")
        if reader is by_messages and kind == "frame":
            # What a dispatch has left over looks unread, too: those have one more time.
            await trio.testing.wait_all_tasks_blocked(0.05)
            mock_clock.jump(10)
        await until_real(lambda: all(conn.close_reason for conn, _ in pairs[sent:]))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert [conn.close_reason for conn, _ in pairs[:sent]] == [None] * sent
        assert {conn.close_reason for conn, _ in pairs[sent:]} == {REASONS[kind]}
        nursery.cancel_scope.cancel()
    for conn, peer in pairs:
        conn.force_close()
        peer.socket.close()


async def until_real(condition: Callable[[], object]) -> None:
    """Wait until *condition* holds, by the real clock."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        await trio.testing.wait_all_tasks_blocked(0.005)


async def test_room_that_came_while_the_loop_was_away(mock_clock: MockClock) -> None:
    """A peer that has read meanwhile has not stalled; when it reads no more, it has."""
    conn, peer = pair(Timeouts(write_stall=10))
    async with peer:
        await fill(conn, 1 << 20)
        conn.send(bytes(1 << 22))
        buffered = conn.buffered
        await trio.testing.wait_all_tasks_blocked(0.02)
        mock_clock.jump(30)
        with suppress(BlockingIOError):
            while peer.socket._sock.recv(65536):
                pass
        # There is room, and the poller has had no turn.
        conn._life.on_write_stalled(True)
        assert conn.close_reason is None
        assert 0 < conn.buffered < buffered
        conn._life.on_write_stalled(True)
        assert conn.close_reason is CloseReason.WRITE_STALLED


async def test_a_stall_is_one() -> None:
    """A peer that reads nothing is given one `write_stall`, and no more bytes at its end: the
    kernel would take some before it says that it has room.
    """
    conn, peer = await tcp_pair(timeouts=Timeouts(write_stall=0.8))
    async with peer, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            with suppress(trio.ClosedResourceError):
                while True:
                    await conn.send_all(bytes(100_000))

        # Longer than the kernel delays an ACK, after which it takes some more.
        await trio.testing.wait_all_tasks_blocked(0.3)
        sent = conn.statistics().bytes_sent
        await conn.wait_closed()
        assert conn.close_reason is CloseReason.WRITE_STALLED
        assert conn.statistics().bytes_sent == sent


@pytest.mark.parametrize("kind", ["dispatch"])
async def test_a_stopped_process(kind: str) -> None:
    """FAULTS 57: a server process that was stopped for longer than `idle` ends those who were
    silent for so long, and none of those who have spoken meanwhile.
    """
    options = '{"timeouts": {"idle": 1.0}}'
    with running("server", kind, options) as server:
        address = ("127.0.0.1", server.answer())
        clients = [socket.create_connection(address) for _ in range(60)]
        try:
            assert server.ask("wait_connections", 60)
            os.kill(server.pid, signal.SIGSTOP)
            try:
                time.sleep(0.2)
                for client in clients[:50]:
                    client.sendall(b"x")
                time.sleep(2)
            finally:
                os.kill(server.pid, signal.SIGCONT)
            assert server.ask("wait_connections", 50)
            assert server.ask("counts")["closed"] == {"IDLE_TIMEOUT": 10}
            for client in clients[:50]:
                client.settimeout(10)
                assert client.recv(1) == b"x"
            # Their time counts from then.
            assert server.ask("wait_connections", 0)
            assert server.ask("counts")["closed"] == {"IDLE_TIMEOUT": 60}
        finally:
            for client in clients:
                client.close()


async def test_callbacks_are_told_of_the_end(autojump_clock: MockClock) -> None:
    """A server made of callbacks hears of the end that a deadline makes, once."""
    told: list[tuple[ConnectionState, CloseReason | None, float]] = []

    def connection(conn: TcpConnection) -> None:
        told.append((conn.state, conn.close_reason, trio.current_time()))

    server = local(
        Callbacks(message=lambda _, buffer: None, connection=connection), timeouts=Timeouts(idle=7)
    )
    async with no_leaks(), serving(server) as address:
        with socket.create_connection(address):
            await trio.sleep(1000)
    assert [state for state, _, _ in told] == [
        ConnectionState.CONNECTED,
        ConnectionState.DISCONNECTED,
    ]
    assert told[1][1] is CloseReason.IDLE_TIMEOUT
    assert in_time(told[1][2], told[0][2], 7)
