"""What becomes of a broadcast at the hard limit: the policy is kept, and no frame is ever torn."""

from __future__ import annotations

import logging
import signal
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

import pytest
import trio
import trio.testing

from tests.conftest import fill, no_leaks, reset, serving, tcp_pair, until
from tests.simulated import SimulatedSocket, simulated
from trioreactor import (
    Buffer,
    CloseReason,
    ConnectionState,
    SendBufferFull,
    SocketOptions,
    TcpConnection,
    TcpServer,
    Watermarks,
)
from trioreactor.overflow import Overflow, check_overflow
from trioreactor.send_buffer import ENTRY_OVERHEAD

DROPPING: list[Overflow] = ["drop_newest", "drop_oldest"]
dropping = pytest.mark.parametrize("overflow", DROPPING)

# Room for eight messages of 64 bytes in the smallest buffer that there is.
LIMIT = 1024
MARKS = Watermarks(high=LIMIT, low=100, limit=LIMIT)
SIZE = LIMIT // 8 - ENTRY_OVERHEAD


def message(i: int, n: int = SIZE) -> bytes:
    """A message of *n* bytes that says which it is."""
    return b"%06d " % i * (n // 7) + b"." * (n % 7)


def stuck(**options: Any) -> tuple[TcpConnection, SimulatedSocket]:
    """A connection whose kernel buffer is full, and one byte more is queued: so little that it
    leaves room for seven messages.
    """
    conn, sock = simulated(room=0, watermarks=MARKS, **options)
    conn.send(b"!")
    return conn, sock


async def delivered(sock: SimulatedSocket) -> bytes:
    """Everything that comes once the peer takes it, after the byte of `stuck`."""
    sock.peer_takes(1 << 20)
    await trio.testing.wait_all_tasks_blocked()
    output = bytes(sock.output)
    assert output[:1] == b"!"
    return output[1:]


@pytest.mark.parametrize("overflow", ["drop", "", None, True, 1, "CLOSE", []])
async def test_unknown_policies(overflow: Any) -> None:
    """Anything but the three is refused at once, where it is written, and nothing is sent."""
    advice = 'pass "close", "drop_newest" or "drop_oldest"'
    with pytest.raises(ValueError, match=advice) as caught:
        TcpServer(print, 0, overflow=overflow)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"TcpServer(overflow={overflow!r})")
    conn, sock = simulated()
    with pytest.raises(ValueError, match=advice):
        conn.offer(b"news", overflow)
    assert not sock.output
    for known in ("close", "drop_newest", "drop_oldest"):
        check_overflow("offer", known)


@pytest.mark.parametrize("overflow", ["close", *DROPPING])
async def test_while_there_is_room_it_is_send(overflow: Overflow) -> None:
    """What is offered and what is sent goes out in order, at once or queued, and nothing drops."""
    conn, sock = simulated(room=40, watermarks=MARKS)
    for i in range(12):
        if i % 2:
            assert conn.offer(message(i, 20), overflow) == 0
        else:
            conn.send(message(i, 20))
    assert conn.offer(b"", overflow) == 0
    assert len(sock.output) == 40
    sock.peer_takes(1000)
    await trio.testing.wait_all_tasks_blocked()
    assert bytes(sock.output) == b"".join(message(i, 20) for i in range(12))
    assert conn.statistics().dropped == 0


async def test_drop_newest() -> None:
    """What has no room is left out, and the answer says so; what was queued stays."""
    conn, sock = stuck()
    dropped = [conn.offer(message(i)) for i in range(20)]
    assert dropped == [0] * 7 + [1] * 13
    assert conn.statistics().dropped == 13
    assert await delivered(sock) == b"".join(message(i) for i in range(7))
    assert conn.offer(message(99)) == 0
    assert bytes(sock.output[-SIZE:]) == message(99)
    assert conn.state is ConnectionState.CONNECTED


async def test_drop_oldest() -> None:
    """The oldest go, as many as it takes; the newest are always there."""
    conn, sock = stuck()
    dropped = [conn.offer(message(i), "drop_oldest") for i in range(20)]
    assert dropped == [0] * 7 + [1] * 13
    # A larger one takes the place of three.
    assert conn.offer(message(20, 3 * SIZE + 2 * ENTRY_OVERHEAD), "drop_oldest") == 3
    assert conn.statistics().dropped == 16
    last = b"".join(message(i) for i in range(16, 20))
    assert await delivered(sock) == last + message(20, 3 * SIZE + 2 * ENTRY_OVERHEAD)
    assert conn.state is ConnectionState.CONNECTED


@dropping
async def test_what_was_sent_stays(overflow: Overflow) -> None:
    """Replies by `send` are never dropped for news, whatever is offered after them."""
    conn, sock = stuck()
    for i in range(3):
        conn.send(b"R" * 80 + b"%d" % i)
        conn.offer(message(i), overflow)
    for i in range(3, 30):
        conn.offer(message(i), overflow)
    # Replies so many that nothing that was offered can stay, in the one case.
    for i in range(3, 30):
        if conn._write.buffer.has_room(81):
            conn.send(b"R" * 80 + b"%d" % (i % 10))
    before = conn.statistics().dropped
    assert conn.offer(message(30), overflow) >= 1
    assert conn.statistics().dropped > before
    got = await delivered(sock)
    assert got.count(b"R" * 80) == conn.buffered + got.count(b"R") // 80
    assert got.startswith(b"R" * 80 + b"0")
    for i in range(3):
        assert b"R" * 80 + b"%d" % i in got


async def test_when_nothing_may_be_dropped_the_new_one_is() -> None:
    """drop_oldest drops no reply: where only those are queued, the news is left out."""
    conn, sock = stuck()
    replies = b"".join(bytes([65 + i]) * 200 for i in range(4))
    for i in range(4):
        conn.send(replies[200 * i : 200 * (i + 1)])
    assert conn.offer(message(1, 200), "drop_oldest") == 1
    assert conn.statistics().dropped == 1
    assert await delivered(sock) == replies


async def test_nothing_is_dropped_for_one_that_has_no_room_at_all() -> None:
    """drop_oldest: where dropping all would not make room, only the new one is dropped."""
    conn, sock = stuck()
    reply = b"R" * 400
    conn.send(reply)
    for i in range(3):
        assert conn.offer(message(i), "drop_oldest") == 0
    assert conn.offer(message(3, 500), "drop_oldest") == 1
    assert (conn.statistics().dropped, conn.refused) == (1, 1)
    # One that has room in the place of two is taken.
    assert conn.offer(message(4, 2 * SIZE), "drop_oldest") == 1
    assert (conn.statistics().dropped, conn.refused) == (2, 1)
    got = await delivered(sock)
    assert got == reply + message(1) + message(2) + message(4, 2 * SIZE)


class Interrupted(deque[bytes]):
    """Ctrl-C comes once, just before what was taken out of the queue is put back."""

    pressed = False

    def extendleft(self, chunks: Iterable[bytes], /) -> None:
        if not self.pressed:
            self.pressed = True
            signal.raise_signal(signal.SIGINT)
        super().extendleft(chunks)


def test_ctrl_c_tears_no_message() -> None:
    """In the middle of drop_oldest it waits: what is half on the wire is not lost, and whoever
    catches the KeyboardInterrupt can end the stream as it should be.
    """
    torn: list[bytes] = []
    interrupted: list[bool] = []

    async def main() -> None:
        conn, sock = stuck()
        for i in range(7):
            conn.offer(message(i), "drop_oldest")
        sock.peer_takes(1 + 10)
        await trio.testing.wait_all_tasks_blocked()
        queue = Interrupted(conn._write.buffer._chunks)
        conn._write.buffer._chunks = queue
        try:
            for i in range(7, 10):
                conn.offer(message(i), "drop_oldest")
            await trio.lowlevel.checkpoint()
        except KeyboardInterrupt:
            interrupted.append(queue.pressed)
        torn.append(await delivered(sock))
        conn.force_close()

    trio.run(main)
    assert interrupted == [True]
    assert torn == [b"".join(message(i) for i in (0, *range(3, 10)))]


async def test_who_hears_of_drops_is_a_function() -> None:
    """`on_drop` is refused where it is written, unless it can be called."""
    with pytest.raises(TypeError, match=r"TcpServer\(on_drop=5\): pass a function"):
        TcpServer(print, 0, on_drop=5)  # type: ignore[arg-type]


async def test_what_is_partly_written_stays() -> None:
    """Of a message that has begun to leave, the rest follows, whatever it displaces."""
    conn, sock = stuck()
    for i in range(7):
        conn.offer(message(i), "drop_oldest")
    sock.peer_takes(1 + 10)
    await trio.testing.wait_all_tasks_blocked()
    for i in range(7, 30):
        conn.offer(message(i), "drop_oldest")
    got = await delivered(sock)
    assert got[:SIZE] == message(0)
    assert got[SIZE:] == b"".join(message(i) for i in range(30 - len(got) // SIZE + 1, 30))
    assert conn.statistics().dropped == 30 - len(got) // SIZE


async def test_close() -> None:
    """With "close" it is `send`: at the limit the connection ends with SLOW_CONSUMER."""
    conn, _ = stuck()
    with pytest.raises(SendBufferFull):
        for i in range(100):
            assert conn.offer(message(i), "close") == 0
    assert conn.close_reason is CloseReason.SLOW_CONSUMER
    assert conn.statistics().dropped == 0


@dropping
@pytest.mark.parametrize("corked", [False, True])
async def test_larger_than_the_limit(overflow: Overflow, corked: bool) -> None:
    """What could never be queued is dropped whole, and never begun: no part of it leaves."""
    conn, sock = simulated(room=LIMIT, watermarks=MARKS)
    answers: list[int] = []

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        buffer.take()
        answers.append(conn.offer(bytes(LIMIT + 1), overflow))

    if corked:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(conn.dispatch, on_message)
            sock.peer_sends(b"go")
            await until(lambda: answers)
            nursery.cancel_scope.cancel()
    else:
        on_message(conn, Buffer())
    assert answers == [1]
    assert (bytes(sock.output), conn.statistics().dropped) == (b"", 1)
    # The largest that could be queued is taken, wherever it goes.
    assert conn.offer(bytes(LIMIT - ENTRY_OVERHEAD), overflow) == 0
    assert len(sock.output) == LIMIT - ENTRY_OVERHEAD


@dropping
async def test_in_a_dispatch_callback(overflow: Overflow) -> None:
    """There too it neither blocks nor closes: with no room, whole messages drop, by the policy."""
    conn, sock = simulated(room=0, watermarks=MARKS)
    answers: list[int] = []
    memory: list[int] = []

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        for byte in buffer.take():
            answers.append(conn.offer(message(byte), overflow))
            memory.append(conn._write.buffer.memory)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, on_message)
        for i in range(0, 30, 5):
            sock.peer_sends(bytes(range(i, i + 5)))
            await trio.testing.wait_all_tasks_blocked()
        assert conn.state is ConnectionState.CONNECTED
        assert (len(answers), sum(answers)) == (30, conn.statistics().dropped)
        assert max(memory) <= LIMIT
        sock.peer_takes(1 << 20)
        await trio.testing.wait_all_tasks_blocked()
        got = [int(sock.output[i : i + 6]) for i in range(0, len(sock.output), SIZE)]
        assert bytes(sock.output) == b"".join(map(message, got))
        assert len(got) == 30 - conn.statistics().dropped
        if overflow == "drop_newest":
            assert got == [i for i in range(30) if not answers[i]] == list(range(len(got)))
        else:
            # The first was tried at once, on its own, and stays.
            assert got == [0, *range(31 - len(got), 30)]
        nursery.cancel_scope.cancel()


@dropping
async def test_callbacks_gather_what_they_offer(overflow: Overflow) -> None:
    """What a callback sends and offers leaves together, in order."""
    conn, sock = simulated(watermarks=Watermarks(high=600, low=0, limit=1024))

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        buffer.take()
        conn.send(b"<")
        for i in range(5):
            assert conn.offer(message(i, 20), overflow) == 0
            conn.send(b"|")
        assert not sock.output

    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, on_message)
        sock.peer_sends(b"go")
        await trio.testing.wait_all_tasks_blocked()
        whole = b"<" + b"".join(message(i, 20) + b"|" for i in range(5))
        assert bytes(sock.output) == whole
        assert len(sock.writes) == 1
        nursery.cancel_scope.cancel()


@dropping
async def test_callbacks_may_offer_more_than_the_limit(overflow: Overflow) -> None:
    """To a peer that reads, a callback may offer any amount: it is written on the way, and neither
    drops nor rises above the high mark.
    """
    conn, sock = simulated(watermarks=Watermarks(high=600, low=0, limit=1024))

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        buffer.take()
        for i in range(50):
            assert conn.offer(message(i, 100 + i), overflow) == 0

    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, on_message)
        sock.peer_sends(b"go")
        await trio.testing.wait_all_tasks_blocked()
        assert bytes(sock.output) == b"".join(message(i, 100 + i) for i in range(50))
        assert conn.statistics().pauses == 0
        nursery.cancel_scope.cancel()


@dropping
async def test_a_break_that_a_callbacks_offer_finds(overflow: Overflow) -> None:
    """A peer that is gone is found while the callback offers: `trio.BrokenResourceError`, as from
    `send`, and no message counts as dropped.
    """
    conn, sock = simulated(watermarks=Watermarks(high=600, low=0, limit=1024))
    raised: list[BaseException] = []

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        buffer.take()
        sock.peer_resets()
        with pytest.raises(trio.BrokenResourceError) as caught:
            for i in range(50):
                conn.offer(message(i, 100), overflow)
        raised.append(caught.value)

    async with trio.open_nursery() as nursery:

        async def run() -> None:
            with suppress(trio.BrokenResourceError):
                await conn.dispatch(on_message)

        nursery.start_soon(run)
        sock.peer_sends(b"go")
        await until(lambda: raised)
    assert conn.statistics().dropped == 0
    conn.force_close()


@pytest.mark.parametrize("overflow", ["close", *DROPPING])
@pytest.mark.parametrize("queued", [False, True])
async def test_after_the_end(overflow: Overflow, queued: bool) -> None:
    """After shutdown and after a close it raises `trio.ClosedResourceError`, also an empty one,
    also with something queued; nothing counts as dropped.
    """
    conn, _ = stuck() if queued else simulated()
    conn.shutdown()
    for data in (b"late", b"", bytes(2 * LIMIT)):
        with pytest.raises(trio.ClosedResourceError):
            conn.offer(data, overflow)
    conn.force_close()
    for data in (b"late", b"", bytes(2 * LIMIT)):
        with pytest.raises(trio.ClosedResourceError):
            conn.offer(data, overflow)
    assert conn.statistics().dropped == 0


@dropping
async def test_a_message_that_is_streamed_is_not_torn(overflow: Overflow) -> None:
    """While `send_all` streams what is larger than the limit nothing can be offered, and a
    broadcast passes that connection by.
    """
    conn, sock = simulated(room=100, watermarks=MARKS)
    server = TcpServer(print, 0, overflow=overflow)  # type: ignore[arg-type]
    large = b"".join(message(i) for i in range(100))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.send_all, large)
        await trio.testing.wait_all_tasks_blocked()
        assert conn.buffered
        with pytest.raises(trio.BusyResourceError):
            conn.offer(message(1), overflow)
        assert server.broadcast(message(1), to=[conn]) == 0
        sock.peer_takes(1 << 20)
    await trio.testing.wait_all_tasks_blocked()
    assert bytes(sock.output) == large
    assert conn.offer(message(1), overflow) == 0


async def test_crossings_come_in_pairs() -> None:
    """High and low marks are told in turn, also where a drop brings the buffer down, and whoever
    waits for room is woken by it.
    """
    conn, _ = simulated(room=0, watermarks=Watermarks(high=500, low=100, limit=LIMIT))
    told: list[tuple[str, int]] = []
    conn.high_water_mark_callback = lambda _, size: told.append(("high", size))
    conn.low_water_mark_callback = lambda _, size: told.append(("low", size))
    conn.send(b"!")
    conn.offer(message(1, 400), "drop_oldest")
    conn.offer(message(2, 400), "drop_oldest")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.wait_send_all_might_not_block)
        await trio.testing.wait_all_tasks_blocked()
        assert [name for name, _ in told] == ["high"]
        assert conn.congested
        # It drops both and rises above the high mark itself, so it is congested as before.
        assert conn.offer(message(3, 700), "drop_oldest") == 2
        assert conn.congested
        await trio.testing.wait_all_tasks_blocked()
        assert told == [("high", 801), ("low", 1), ("high", 701)]
        # And one that fits below.
        assert conn.offer(message(4, 300), "drop_oldest") == 1
        assert not conn.congested
    await trio.testing.wait_all_tasks_blocked()
    assert told == [("high", 801), ("low", 1), ("high", 701), ("low", 1)]
    statistics = conn.statistics()
    assert (statistics.pauses, statistics.resumes) == (2, 2)


@dropping
async def test_what_is_offered_is_kept_as_it_was(overflow: Overflow) -> None:
    """A buffer that changes afterwards changes nothing of what is queued; what is no data is
    refused.
    """
    conn, sock = stuck()
    data = bytearray(b"as it was")
    conn.offer(data, overflow)
    conn.offer(memoryview(data)[3:], overflow)  # type: ignore[arg-type]
    data[:] = b"different"
    for no_data in (5, "text", None, [1, 2]):
        with pytest.raises(TypeError):
            conn.offer(no_data, overflow)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            TcpServer(print, 0).broadcast(no_data)  # type: ignore[arg-type]
    assert await delivered(sock) == b"as it wasit was"


# -- a server's broadcast, to real peers

NEWS, REPLY = b"N", b"R"

# A frame: its length, its kind, its number, and a body that follows from the number.
HEADER = struct.Struct("!IcI")


def frame(kind: bytes, number: int) -> bytes:
    """A frame whose every byte the reader can check, now below and now above the gather size."""
    size = 20 + number * 389 % 1500
    return HEADER.pack(5 + size, kind, number) + bytes([number % 251]) * size


class Reader:
    """A peer that reads while it is let, and checks every byte."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.may_read = trio.Event()
        self.may_read.set()
        self.got: dict[bytes, list[int]] = {NEWS: [], REPLY: []}
        self.left = b""

    async def run(self) -> None:
        """Read until EOF or the end."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while True:
                await self.may_read.wait()
                data = await self.stream.receive_some(4096)
                if not data:
                    break
                self.check(data)

    def check(self, data: bytes) -> None:
        """Take the frames apart: whole ones only, each with its body."""
        data = self.left + data
        start = 0
        while len(data) - start >= HEADER.size:
            length, kind, number = HEADER.unpack_from(data, start)
            assert kind in self.got
            whole = frame(kind, number)
            assert length == len(whole) - 4
            if len(data) - start < len(whole):
                break
            assert data[start : start + len(whole)] == whole
            self.got[kind].append(number)
            start += len(whole)
        self.left = data[start:]

    @property
    def news(self) -> list[int]:
        """The numbers of the news that came, in the order they came."""
        return self.got[NEWS]


class Newsroom:
    """A server that sends news to readers, and what its `on_drop` was told."""

    limit = 32768

    def __init__(self, overflow: Overflow, on_drop: Callable[..., object] | None = None) -> None:
        self.drops: list[tuple[TcpConnection, int, int]] = []
        self.serial = 0
        # The most that any connection had queued, as the limit counts it.
        self.peak = 0
        self.server = TcpServer(
            self.serve,
            0,
            host="127.0.0.1",
            overflow=overflow,
            on_drop=on_drop or self.note_drop,
            watermarks=Watermarks(high=8192, low=2048, limit=self.limit),
            socket_options=SocketOptions(send_buffer=8192),
        )
        self.readers: list[Reader] = []
        self.conns: list[TcpConnection] = []

    async def serve(self, conn: TcpConnection) -> None:
        """Let the news come until the reader has enough."""
        async for _ in conn:
            pass

    def note_drop(self, conn: TcpConnection, n: int) -> None:
        """What the server is to call."""
        self.drops.append((conn, n, self.serial))

    @asynccontextmanager
    async def open(self, readers: int) -> AsyncIterator[None]:
        """Serve *readers*, one after the other, so that their order is known."""
        async with no_leaks(), serving(self.server) as address, trio.open_nursery() as nursery:
            for count in range(1, readers + 1):
                sock = socket.socket()
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.connect(address)
                reader = Reader(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
                self.readers.append(reader)
                nursery.start_soon(reader.run)
                await until(lambda count=count: len(self.server.connections) == count)
            self.conns = list(self.server.connections.values())
            yield
            for reader in self.readers:
                reader.may_read.set()
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await reader.stream.send_eof()
            await until(lambda: not self.server.connections)
            for reader in self.readers:
                await reader.stream.aclose()
            nursery.cancel_scope.cancel()

    async def publish(self, frames: int) -> list[int]:
        """Send so much news, and wait for the readers that read; the answers of broadcast."""
        answers = []
        for _ in range(frames):
            answers.append(self.server.broadcast(frame(NEWS, self.serial)))
            self.serial += 1
            for conn in self.conns:
                assert conn._write.buffer.memory <= self.limit
                self.peak = max(self.peak, conn._write.buffer.memory)
            if self.serial % 10 == 0:
                await self.caught_up()
        await self.caught_up()
        return answers

    async def caught_up(self) -> None:
        """Wait until those who read have it all: nobody of them is ever at the limit."""
        reading = [
            (reader, conn)
            for reader, conn in zip(self.readers, self.conns, strict=True)
            if reader.may_read.is_set()
        ]
        last = self.serial - 1
        await until(
            lambda: all(
                (not conn.buffered and reader.news[-1:] == [last])
                or conn.state is not ConnectionState.CONNECTED
                for reader, conn in reading
            )
        )


def stop(reader: Reader) -> None:
    """It reads no more, after a read that may be under way."""
    reader.may_read = trio.Event()


@dropping
async def test_a_reader_that_stops_and_starts_again(overflow: Overflow) -> None:
    """It keeps its connection and misses whole frames only, those of the policy, all counted and
    told; the others get everything, and every reply arrives.
    """
    newsroom = Newsroom(overflow)
    server = newsroom.server
    async with newsroom.open(3):
        slow, conn = newsroom.readers[1], newsroom.conns[1]
        missed: list[int] = []
        replies = 0
        for _ in range(3):
            await newsroom.publish(15)
            assert slow.news[-1] == newsroom.serial - 1
            # Beginning with one that comes while it still reads, so that there is a last one.
            stop(slow)
            dropped = conn.statistics().dropped
            for _ in range(4):
                answers = await newsroom.publish(2)
                assert answers == [3, 3]
                assert conn.send(frame(REPLY, replies)) or conn.congested
                replies += 1
            answers = await newsroom.publish(200)
            assert conn.statistics().dropped > dropped
            # It became as full as it may be: a frame of the largest size had no room.
            assert newsroom.peak > newsroom.limit - 1600 - 2 * ENTRY_OVERHEAD
            newsroom.peak = 0
            if overflow == "drop_oldest":
                assert answers == [3] * 200
            else:
                # One that took less: the one that reads no more.
                assert set(answers) == {2, 3}
                assert answers.count(2) == conn.statistics().dropped - dropped
            slow.may_read.set()
            await until(lambda: not conn.buffered)
            assert conn.state is ConnectionState.CONNECTED
        await newsroom.publish(15)
        statistics = conn.statistics()
        assert server.statistics().dropped == statistics.dropped
    # All that was sent has come, and whole: nothing is left over.
    everything = list(range(newsroom.serial))
    for reader in newsroom.readers:
        assert not reader.left
        assert reader.news == sorted(set(reader.news))
        if reader is not slow:
            assert reader.news == everything
    assert slow.got[REPLY] == list(range(replies))
    missed = sorted(set(everything) - set(slow.news))
    assert len(missed) == statistics.dropped > 300
    assert sum(n for _, n, _ in newsroom.drops) == len(missed)
    assert {c for c, _, _ in newsroom.drops} == {conn}
    if overflow == "drop_newest":
        assert [(n, number) for _, n, number in newsroom.drops] == [(1, i) for i in missed]
    else:
        # Those that were dropped are always older than those that displaced them.
        gone = 0
        for _, n, number in newsroom.drops:
            gone += n
            assert missed[gone - 1] < number
    # The counters outlive the connections.
    assert server.statistics().dropped == statistics.dropped
    assert server.statistics().closed == {CloseReason.PEER_EOF: 3}


async def test_close_ends_the_slow_one() -> None:
    """By default a reader that is too slow is closed with SLOW_CONSUMER, at the limit and not
    before; the others get everything, and nobody is told of a drop.
    """
    newsroom = Newsroom("close")
    async with newsroom.open(3):
        slow, conn = newsroom.readers[1], newsroom.conns[1]
        await newsroom.publish(15)
        stop(slow)
        answers = await newsroom.publish(200)
        assert conn.close_reason is CloseReason.SLOW_CONSUMER
        assert answers == sorted(answers, reverse=True)
        assert set(answers) == {2, 3}
        await until(lambda: len(newsroom.server.connections) == 2)
    for reader in newsroom.readers:
        if reader is not slow:
            assert reader.news == list(range(newsroom.serial))
    # What came before the end came whole and without a gap.
    assert slow.news == list(range(len(slow.news)))
    statistics = newsroom.server.statistics()
    assert statistics.closed == {CloseReason.SLOW_CONSUMER: 1, CloseReason.PEER_EOF: 2}
    assert (statistics.dropped, newsroom.drops) == (0, [])


@dropping
async def test_on_drop_that_raises(overflow: Overflow, caplog: pytest.LogCaptureFixture) -> None:
    """It ends the connection that it was called for, logged once; the broadcast goes on."""
    called: list[TcpConnection] = []

    def on_drop(conn: TcpConnection, n: int) -> None:
        called.append(conn)
        raise LookupError("on_drop failed")

    newsroom = Newsroom(overflow, on_drop)
    with caplog.at_level(logging.ERROR, "trioreactor"):
        async with newsroom.open(3):
            stop(newsroom.readers[1])
            await newsroom.publish(200)
            assert called == [newsroom.conns[1]]
            assert called[0].close_reason is CloseReason.HANDLER_ERROR
            await until(lambda: len(newsroom.server.connections) == 2)
    assert newsroom.readers[0].news == newsroom.readers[2].news == list(range(200))
    (record,) = caplog.records
    assert record.name == "trioreactor.server"
    assert called[0].name in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], LookupError)


@dropping
async def test_on_drop_may_close(overflow: Overflow) -> None:
    """It may close the connection, with a reason of its own choice: a limit to one's patience."""

    def on_drop(conn: TcpConnection, n: int) -> None:
        if conn.statistics().dropped >= 10:
            conn.force_close(CloseReason.SLOW_CONSUMER)

    newsroom = Newsroom(overflow, on_drop)
    async with newsroom.open(2):
        stop(newsroom.readers[0])
        await newsroom.publish(200)
        assert newsroom.conns[0].close_reason is CloseReason.SLOW_CONSUMER
    assert newsroom.server.statistics().dropped == newsroom.conns[0].statistics().dropped >= 10
    assert newsroom.readers[1].news == list(range(200))


@dropping
async def test_a_reset_while_dropping(overflow: Overflow) -> None:
    """A slow reader that resets is one that ended; it is passed by from then on."""
    newsroom = Newsroom(overflow)
    async with newsroom.open(2):
        slow, conn = newsroom.readers[0], newsroom.conns[0]
        stop(slow)
        await newsroom.publish(100)
        reset(slow.stream.socket)
        answers = await newsroom.publish(100)
        await until(lambda: conn.state is ConnectionState.DISCONNECTED or conn.broken)
        assert newsroom.server.broadcast(frame(NEWS, newsroom.serial)) == 1
        newsroom.serial += 1
        assert set(answers) <= {1, 2}
    assert newsroom.readers[1].news == list(range(201))


@dropping
async def test_broadcast_counts_who_took_it(overflow: Overflow) -> None:
    """Where the new message itself was left out, because only replies are queued or because it is
    larger than the limit, that connection did not take it, whatever the policy.
    """
    conn, _ = stuck()
    server = TcpServer(print, 0, overflow=overflow)  # type: ignore[arg-type]
    assert server.broadcast(bytes(LIMIT + 1), to=[conn]) == 0
    assert server.broadcast(message(1), to=[conn]) == 1
    conn.send(bytes(LIMIT - 65 - 2 * ENTRY_OVERHEAD - SIZE))
    assert server.broadcast(message(2, 2 * SIZE + 64), to=[conn]) == 0
    assert server.broadcast(b"", to=[conn]) == 1
    conn.force_close()
    assert server.broadcast(message(3), to=[conn]) == 0


@dropping
async def test_a_broadcast_that_no_buffer_can_hold(overflow: Overflow) -> None:
    """To one that has nothing queued it is left out as to one that has: nobody is closed for it."""
    conn, sock = simulated(watermarks=MARKS, room=10)
    drops: list[int] = []
    server = TcpServer(print, 0, overflow=overflow, on_drop=lambda _, n: drops.append(n))  # type: ignore[arg-type]
    assert server.broadcast(bytes(LIMIT + 1), to=[conn]) == 0
    assert (drops, sock.output, conn.state) == ([1], b"", ConnectionState.CONNECTED)
    conn.force_close()


async def test_a_broadcast_of_which_nothing_is_written_may_be_dropped() -> None:
    """Though it was the first in the queue, and was offered to a kernel that was full."""
    conn, sock = simulated(watermarks=MARKS, room=0)
    server = TcpServer(print, 0, overflow="drop_oldest")  # type: ignore[arg-type]
    for i in range(9):
        assert server.broadcast(message(i), to=[conn]) == 1
    assert conn.statistics().dropped == 1
    sock.peer_takes(LIMIT)
    await trio.testing.wait_all_tasks_blocked()
    assert sock.output == b"".join(message(i) for i in range(1, 9))
    conn.force_close()


async def test_without_on_drop() -> None:
    """It need not be given: the counters tell, too."""
    left, right = await tcp_pair(watermarks=Watermarks(high=1000, low=0, limit=70000))
    server = TcpServer(print, 0, overflow="drop_newest")  # type: ignore[arg-type]
    async with left, right:
        await fill(left, 1000)
        while left.buffered <= 69000:
            left.send(bytes(500))
        assert server.broadcast(bytes(1000), to=[left, right]) == 1
        assert (left.statistics().dropped, right.statistics().dropped) == (1, 0)
        left.force_close()


@pytest.mark.parametrize("overflow", DROPPING)
async def test_broadcast_from_a_callback(overflow: Literal["drop_newest", "drop_oldest"]) -> None:
    """A chat server's own turn: the one who speaks and does not listen is treated as all others."""
    server: TcpServer
    spoken: list[int] = []

    async def serve(conn: TcpConnection) -> None:
        await conn.dispatch(on_message)

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        for _ in buffer.take():
            server.broadcast(frame(NEWS, len(spoken)))
            spoken.append(conn.statistics().dropped)

    server = TcpServer(
        serve,
        0,
        host="127.0.0.1",
        overflow=overflow,
        watermarks=Watermarks(high=8192, low=2048, limit=32768),
        socket_options=SocketOptions(send_buffer=8192),
    )
    async with no_leaks(), serving(server) as address:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(address)
        async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
            for i in range(20):
                await stream.send_all(b"x" * 20)
                await until(lambda i=i: len(spoken) == 20 * (i + 1))
            (conn,) = server.connections.values()
            assert 0 < spoken[-1] < 400
            assert conn._write.buffer.memory <= 32768
            reader = Reader(stream)
            await stream.send_eof()
            await reader.run()
    assert not reader.left
    assert reader.news == sorted(set(reader.news))
    assert len(reader.news) == 400 - spoken[-1]
    # The oldest make way for the newest, or the newest are left out.
    assert (reader.news[-1] == 399) == (overflow == "drop_oldest")


# News of 564 bytes each, of which 14 have room, and answers.
NEWS_SIZE, ANSWER_SIZE = 500, 100
FLOODED = Watermarks(high=4000, low=1500, limit=8192)


def flooded(overflow: Overflow) -> tuple[TcpConnection, SimulatedSocket]:
    """A connection whose peer takes nothing, full of news."""
    conn, sock = simulated(room=0, watermarks=FLOODED)
    conn.send(b"!")
    assert sum(conn.offer(message(i, NEWS_SIZE), overflow) for i in range(20)) == 6
    assert conn.congested
    return conn, sock


@dropping
async def test_answers_take_the_place_of_news(overflow: Overflow) -> None:
    """What must not be lost has room wherever news can be dropped for it, and is not made to wait
    behind a queue that news keep full.
    """
    conn, sock = flooded(overflow)
    answers = [message(1000 + i, ANSWER_SIZE) for i in range(5)]
    with trio.fail_after(1):
        conn.send(answers[0])
        await conn.send_all(answers[1])
        for answer in answers[2:]:
            await conn.wait_uncongested(len(answer))
            conn.send(answer)
            # The news go on.
            conn.offer(message(99, NEWS_SIZE), overflow)
    assert conn.state is ConnectionState.CONNECTED
    output = await delivered(sock)
    places = [output.index(answer) for answer in answers]
    assert places == sorted(places)
    assert (len(output) - len(answers) * ANSWER_SIZE) % NEWS_SIZE == 0
    conn.force_close()


@dropping
async def test_answers_alone_are_bounded(overflow: Overflow) -> None:
    """One who waits, waits for answers before it, and not for news; one who does not meets the
    limit when nothing is left that may be dropped.
    """
    conn, _ = flooded(overflow)
    sent = 0
    with trio.move_on_after(0.05):
        while True:
            await conn.wait_uncongested(NEWS_SIZE)
            conn.send(message(sent, NEWS_SIZE))
            sent += 1
    assert sent == 3
    assert conn.state is ConnectionState.CONNECTED
    with pytest.raises(SendBufferFull):
        while sent < 20:
            conn.send(message(sent, NEWS_SIZE))
            sent += 1
    assert sent == 15
    assert conn.close_reason is CloseReason.SLOW_CONSUMER


@dropping
async def test_drops_for_answers_are_told_of(overflow: Overflow) -> None:
    """The next offer answers for those, too: what is told is what was dropped."""
    conn, _ = flooded(overflow)
    told = 6
    assert conn.statistics().dropped == told
    for i in range(3):
        conn.send(message(i, NEWS_SIZE))
    assert conn.statistics().dropped > told
    told += conn.offer(message(99, NEWS_SIZE), overflow)
    assert told == conn.statistics().dropped
    conn.force_close()
