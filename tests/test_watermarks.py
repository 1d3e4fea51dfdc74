"""The watermarks at saturation: each crossing is told once, and a sender that heeds them pauses."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Pair, fill, no_leaks, tcp_pair, unix_pair
from trioreactor import SendBufferFull, TcpConnection, TcpServer, Watermarks
from trioreactor.state import CloseReason

MARKS = Watermarks(high=65536, low=16384)


class Recorder:
    """What the callbacks of a connection said."""

    def __init__(self, conn: TcpConnection) -> None:
        self.events: list[str] = []
        conn.high_water_mark_callback = self.high
        conn.low_water_mark_callback = self.low
        conn.write_complete_callback = self.complete

    def high(self, conn: TcpConnection, size: int) -> None:
        """Above the high mark."""
        assert size > MARKS.high
        self.events.append("high")

    def low(self, conn: TcpConnection, size: int) -> None:
        """At the low mark."""
        assert size <= MARKS.low
        self.events.append("low")

    def complete(self, conn: TcpConnection) -> None:
        """Everything is with the kernel."""
        self.events.append("complete")


async def read_exactly(conn: TcpConnection, size: int) -> bytes:
    """*size* bytes from *conn*."""
    got = bytearray()
    while len(got) < size:
        chunk = await conn.receive_some(size - len(got))
        assert chunk, "an early EOF"
        got += chunk
    return bytes(got)


@pytest.mark.parametrize("piece", [1, 65536, 1048576])
@pytest.mark.parametrize("mode", ["coroutine", "dispatch"])
async def test_each_crossing_is_told_once(
    make_pair: Callable[..., Awaitable[Pair]], piece: int, mode: str
) -> None:
    """A reader that stops: high fires once, then, when it reads again, low once."""
    async with no_leaks():
        left, right = await make_pair()
        recorder = Recorder(left)
        async with trio.open_nursery() as nursery:
            if mode == "dispatch":
                nursery.start_soon(left.dispatch, lambda conn, buffer: None)
            total = 0
            for _ in range(2):
                # Large pieces first, where the small ones would take for ever to fill the kernel.
                total += await fill(left, max(piece, 65536)) if piece > 1 else await fill(left)
                while piece == 1 and left.statistics().buffered <= MARKS.high:
                    left.send(b"x")
                    total += 1
                for _ in range(3):
                    assert not left.send(bytes(piece))
                    total += piece
                await trio.testing.wait_all_tasks_blocked()
                assert recorder.events.count("high") == recorder.events.count("low") + 1
                assert recorder.events[-1] == "high"
                await read_exactly(right, total)
                total = 0
                await left.wait_drained()
                await trio.testing.wait_all_tasks_blocked()
                assert recorder.events[-3:] == ["high", "low", "complete"]
            nursery.cancel_scope.cancel()
        statistics = left.statistics()
        assert statistics.pauses == statistics.resumes == 2
        assert recorder.events.count("high") == recorder.events.count("low") == 2
        await left.aclose()
        await right.aclose()


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("send"), st.sampled_from([1, 100, 5000, 65536, 300000])),
            st.tuples(st.just("read"), st.sampled_from([1, 4096, 100000, 1000000])),
        ),
        max_size=30,
    ),
    dispatching=st.booleans(),
)
def test_random_interleavings(steps: list[tuple[str, int]], dispatching: bool) -> None:
    """However sends and reads mix, crossings alternate, `send`'s answer agrees with them, and the
    bytes arrive whole and in order.
    """

    async def main() -> None:
        left, right = await unix_pair()
        recorder = Recorder(left)
        sent = bytearray()
        got = bytearray()
        number = 0
        async with trio.open_nursery() as nursery:
            if dispatching:
                nursery.start_soon(left.dispatch, lambda conn, buffer: None)
            for what, size in steps:
                if what == "send":
                    number += 1
                    data = bytes([number % 251]) * size
                    before = left.statistics()
                    may_go_on = left.send(data)
                    after = left.statistics()
                    sent += data
                    assert may_go_on == (after.pauses == after.resumes)
                    assert after.bytes_sent + after.buffered == len(sent)
                    assert after.pauses - before.pauses in (0, 1)
                elif len(got) < len(sent):
                    got += await right.receive_some(size)
                await trio.testing.wait_all_tasks_blocked()
            while len(got) < len(sent):
                got += await right.receive_some()
            await left.wait_drained()
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert got == sent
        marks = [event for event in recorder.events if event != "complete"]
        assert marks == ["high", "low"] * (len(marks) // 2)
        statistics = left.statistics()
        assert statistics.pauses == statistics.resumes == len(marks) // 2
        if sent:
            assert recorder.events[-1] == "complete"
        left.force_close()
        right.force_close()

    trio.run(main)


async def test_send_all_waits_for_the_low_mark() -> None:
    """FAULT 22: a sender that uses `send_all` pauses when the peer stops, and memory stays put."""
    left, right = await tcp_pair()
    sent = 0

    async def sender() -> None:
        nonlocal sent
        while True:
            await left.send_all(bytes(32768))
            sent += 32768

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender)
        await trio.testing.wait_all_tasks_blocked(0.05)
        stopped_at = sent
        assert MARKS.high < left.statistics().buffered <= MARKS.high + 32768
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert sent == stopped_at
        # One read of a little wakes nobody; emptying the pipe does.
        await read_exactly(right, stopped_at)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert sent > stopped_at
        nursery.cancel_scope.cancel()
    left.force_close()
    right.force_close()


async def test_write_complete_is_told_after_a_direct_write_too() -> None:
    """It fires when nothing is queued any more, never inside `send`, once for sends together."""
    left, right = await tcp_pair()
    recorder = Recorder(left)
    left.send(b"one")
    left.send(b"two")
    assert recorder.events == []
    await trio.testing.wait_all_tasks_blocked()
    assert recorder.events == ["complete"]
    left.send(b"")
    await trio.testing.wait_all_tasks_blocked()
    assert recorder.events == ["complete"]
    left.force_close()
    right.force_close()


async def test_write_complete_that_sends_does_not_recurse() -> None:
    """A callback that sends on completion (chargen) is called from the loop each time."""
    left, right = await tcp_pair()
    depth = deepest = calls = 0

    def complete(conn: TcpConnection) -> None:
        nonlocal depth, deepest, calls
        depth += 1
        deepest = max(deepest, depth)
        calls += 1
        if calls < 2000:
            conn.send(b"x")
        depth -= 1

    left.write_complete_callback = complete
    left.send(b"x")
    await read_exactly(right, 2000)
    await trio.testing.wait_all_tasks_blocked()
    assert (calls, deepest) == (2000, 1)
    left.force_close()
    right.force_close()


async def test_a_sender_that_does_not_heed_loses_the_connection() -> None:
    """FAULT 24: at the hard limit `send` raises, the reason is SLOW_CONSUMER, the fd is closed."""
    async with no_leaks():
        left, right = await tcp_pair(watermarks=Watermarks(limit=262144))
        most = 0
        with pytest.raises(SendBufferFull, match="would pass the limit of 262144"):
            for _ in range(100000):
                left.send(bytes(1000))
                most = max(most, left.statistics().buffered)
        assert 200000 < most <= 262144
        assert left.close_reason is CloseReason.SLOW_CONSUMER
        with pytest.raises(trio.BrokenResourceError):
            left.send(b"more")
        await right.aclose()
        await left.aclose()


async def test_a_million_tiny_sends() -> None:
    """FAULT 25: what a queue of tiny or empty sends costs is counted, and they close cleanly."""
    left, right = await unix_pair()
    sent = await fill(left)
    for _ in range(1_000_000):
        left.send(b"x")
        left.send(b"")
    # The queue holds each byte about once: a million one-byte objects would be over 30 MB.
    assert left._write.buffer.memory < 1_200_000 + sent
    assert left._write.buffer.entries < 200
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.aclose)
        await read_exactly(right, sent + 1_000_000)
        assert await right.receive_some() == b""
    await right.aclose()


async def test_two_senders_do_not_interleave() -> None:
    """FAULT 28: each `send` and `send_all` is whole, whoever else sends."""
    left, right = await unix_pair()
    a, b = b"a" * 300_000, b"b" * 300_000

    async def first() -> None:
        await left.send_all(a)

    async def second() -> None:
        # Not send_all: two tasks that wait at once are refused, as with any trio stream.
        left.send(b)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        nursery.start_soon(second)
        got = await read_exactly(right, len(a) + len(b))
    assert got in (a + b, b + a)
    left.force_close()
    right.force_close()


async def test_data_beyond_the_limit_is_streamed() -> None:
    """`send_all` of more than the hard limit arrives whole, within the limit's memory; a `send`
    meanwhile is refused instead of tearing it apart.
    """
    left, right = await unix_pair(watermarks=Watermarks(high=8192, low=2048, limit=16384))
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    data = bytes(range(256)) * 4000
    most = 0
    refused = False

    async def reader() -> bytes:
        nonlocal most, refused
        got = bytearray()
        while len(got) < len(data):
            most = max(most, left.statistics().buffered)
            statistics = left.statistics()
            if statistics.buffered and statistics.buffered + statistics.bytes_sent < len(data):
                with pytest.raises(trio.BusyResourceError):
                    left.send(b"between")
                refused = True
            got += await right.receive_some()
        return bytes(got)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.send_all, data)
        assert await reader() == data
    assert 0 < most <= 16384
    assert refused
    assert left.send(b"after")
    assert await right.receive_some() == b"after"
    left.force_close()
    right.force_close()


async def test_cancelling_a_streamed_send_breaks_the_connection() -> None:
    """Half a message cannot be taken back, so nothing may follow it."""
    left, right = await unix_pair(watermarks=Watermarks(high=8192, low=2048, limit=16384))
    with trio.move_on_after(0.05) as scope:
        await left.send_all(bytes(10_000_000))
    assert scope.cancelled_caught
    assert left.close_reason is CloseReason.CANCELLED
    with pytest.raises(trio.BrokenResourceError):
        left.send(b"more")
    right.force_close()


async def test_a_stuck_reader_costs_the_others_nothing() -> None:
    """FAULT 26: a broadcast is queued on a stuck connection and sent on the others at once."""
    async with no_leaks():
        got: list[bytes] = []

        async def handler(conn: TcpConnection) -> None:
            await conn.draining.wait()

        server = TcpServer(handler, 0, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            (acceptor,) = await nursery.start(server.serve)
            stuck = await trio.testing.open_stream_to_socket_listener(acceptor)
            stuck.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            healthy = await trio.testing.open_stream_to_socket_listener(acceptor)
            while len(server.connections) < 2:
                await trio.sleep(0)
            message = bytes(65536)
            for _ in range(200):
                assert server.broadcast(message) == 2
                received = 0
                while received < len(message):
                    received += len(await healthy.receive_some())
                got.append(message)
            assert server.statistics().buffered > 5_000_000
            await stuck.aclose()
            await healthy.aclose()
            server.close()
        assert len(got) == 200
