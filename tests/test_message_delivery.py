"""Codec.on_message: messages in dispatch mode, in turns, paused, and up to the EOF."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.conftest import Pair, connect, everything, no_leaks, serving, until
from tests.simulated import simulated
from trioreactor import (
    NEED_MORE,
    Buffer,
    Callbacks,
    CloseReason,
    FrameTooLarge,
    Heartbeat,
    IncompleteFrame,
    LengthHeaderCodec,
    NeedMore,
    ReceiveBufferFull,
    TcpConnection,
    TcpServer,
    Timeouts,
    Watermarks,
    dispatch_messages,
)

CODEC = LengthHeaderCodec()
MakePair = Callable[..., Awaitable[Pair]]


def frames(*messages: bytes) -> bytes:
    """The messages as they go on the wire."""
    return b"".join(map(CODEC.encode, messages))


def numbered(count: int) -> list[bytes]:
    """So many different messages."""
    return [b"%d" % i for i in range(count)]


def echo(conn: TcpConnection, message: bytes) -> None:
    """Send back each message."""
    conn.send(CODEC.encode(message))


# -- delivery


async def test_every_message_is_delivered(make_pair: MakePair) -> None:
    """Pieces of any size, bursts of any number: each message once and in order, until EOF."""
    async with no_leaks():
        peer, conn = await make_pair()
        messages = [*numbered(1000), bytes(65536), b""]
        data = frames(*messages)
        got: list[bytes] = []
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def dispatch() -> None:
                await conn.dispatch(CODEC.on_message(lambda _conn, message: got.append(message)))

            for size in (1, 7, 1000):
                await peer.send_all(data[:size])
                data = data[size:]
                await wait_all_tasks_blocked()
            await peer.send_all(data)
            await peer.send_eof()
        assert got == messages
        await peer.aclose()
        await conn.aclose()


@pytest.mark.parametrize("count", [31, 32, 33, 64, 300])
async def test_a_burst_needs_no_further_input(count: int, make_pair: MakePair) -> None:
    """Of any number of messages that came together none waits for more to come."""
    peer, conn = await make_pair()
    got: list[bytes] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, CODEC.on_message(lambda _conn, m: got.append(m)))
        await peer.send_all(frames(*numbered(count)))
        await until(lambda: len(got) == count)
        await peer.send_all(frames(b"next"))
        await until(lambda: len(got) == count + 1)
        nursery.cancel_scope.cancel()
    assert got == [*numbered(count), b"next"]
    await peer.aclose()
    await conn.aclose()


async def test_what_a_turn_sends_leaves_together() -> None:
    """The answers to one turn's messages are one write."""
    conn, sock = simulated()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, CODEC.on_message(echo))
        sock.peer_sends(frames(*numbered(32)))
        await wait_all_tasks_blocked()
        assert bytes(sock.output) == frames(*numbered(32))
        assert len(sock.writes) == 1
        nursery.cancel_scope.cancel()
    await conn.aclose()


async def test_a_burst_leaves_the_others_their_turn() -> None:
    """Between two messages of another connection one of many messages is given 2 turns at most."""
    busy, flood = simulated()
    other, sock = simulated()
    order: list[str] = []

    def ask_again(_conn: TcpConnection, message: bytes) -> None:
        order.append("other")
        sock.peer_sends(frames(message))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(busy.dispatch, CODEC.on_message(lambda *_: order.append("busy")))
        nursery.start_soon(other.dispatch, CODEC.on_message(ask_again))
        await wait_all_tasks_blocked()
        flood.peer_sends(frames(b"x") * 10_000)
        sock.peer_sends(frames(b"ping"))
        await until(lambda: order.count("busy") == 10_000)
        nursery.cancel_scope.cancel()
    last = len(order) - order[::-1].index("busy")
    runs = [len(run) for run in " ".join(order[:last]).split("other")]
    assert max(runs) <= 2 * 32 * len("busy ") + 2
    # Nobody is there to end it in turn.
    busy.force_close()
    other.force_close()


async def test_other_tasks_run_during_a_burst() -> None:
    """A task that is always ready has its turn after a few turns of a burst."""
    conn, sock = simulated()
    count, worst = [0, 0], [0]
    async with trio.open_nursery() as nursery:

        def deliver(_conn: TcpConnection, _message: bytes) -> None:
            count[0] += 1

        nursery.start_soon(conn.dispatch, CODEC.on_message(deliver))
        await wait_all_tasks_blocked()
        sock.peer_sends(frames(b"x") * 20_000)
        with trio.fail_after(20):
            while count[0] < 20_000:
                before = count[0]
                await trio.lowlevel.checkpoint()
                worst[0] = max(worst[0], count[0] - before)
        nursery.cancel_scope.cancel()
    # Tasks that are ready run in any order, so two times of the poller may come together: four
    # rounds each, and one more turn for the event.
    assert worst[0] <= 2 * 5 * 32
    await conn.aclose()


# -- pausing and closing inside a message's callback


async def test_stop_reading_inside_a_callback(make_pair: MakePair) -> None:
    """No message is delivered while paused, and none is lost: `start_reading` goes on."""
    peer, conn = await make_pair()
    got: list[bytes] = []

    def pause(conn: TcpConnection, message: bytes) -> None:
        got.append(message)
        if len(got) % 100 == 0:
            conn.stop_reading()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, CODEC.on_message(pause))
        await peer.send_all(frames(*numbered(350)))
        for expected in (100, 200, 300):
            await until(lambda expected=expected: len(got) >= expected)
            await wait_all_tasks_blocked()
            assert len(got) == expected
            assert not conn.delivering
            conn.start_reading()
            assert conn.delivering
        await until(lambda: len(got) == 350)
        nursery.cancel_scope.cancel()
    assert not conn.delivering
    assert got == numbered(350)
    await peer.aclose()
    await conn.aclose()


@pytest.mark.parametrize("how", ["force_close", "raise"])
async def test_no_message_after_the_end(how: str, make_pair: MakePair) -> None:
    """`force_close` or an error inside a callback: it is called no more."""
    peer, conn = await make_pair()
    got: list[bytes] = []

    def end(conn: TcpConnection, message: bytes) -> None:
        got.append(message)
        if message == b"5":
            if how == "force_close":
                conn.force_close()
            else:
                raise KeyError(message)

    await peer.send_all(frames(*numbered(300)))
    if how == "raise":
        with pytest.raises(KeyError):
            await conn.dispatch(CODEC.on_message(end))
    else:
        await conn.dispatch(CODEC.on_message(end))
    assert got == numbered(6)
    await peer.aclose()
    await conn.aclose()


async def test_cancelling_leaves_the_rest(make_pair: MakePair) -> None:
    """Dispatch cancelled inside a burst: another dispatch gives the rest, from the next message."""
    peer, conn = await make_pair()
    got: list[bytes] = []
    scope = trio.CancelScope()

    def cancel(_conn: TcpConnection, message: bytes) -> None:
        got.append(message)
        if message == b"5":
            scope.cancel()

    await peer.send_all(frames(*numbered(300)))
    await peer.send_eof()
    with scope:
        await conn.dispatch(CODEC.on_message(cancel))
    # A cancelled task still runs: what its turn had is delivered.
    assert got == numbered(len(got))
    await conn.dispatch(CODEC.on_message(lambda _conn, message: got.append(message)))
    assert got == numbered(300)
    await peer.aclose()
    await conn.aclose()


# -- the EOF


async def test_eof_inside_a_message(make_pair: MakePair) -> None:
    """IncompleteFrame comes out of dispatch, after the messages before it."""
    peer, conn = await make_pair()
    got: list[bytes] = []
    await peer.send_all(frames(*numbered(300), b"torn")[:-1])
    await peer.send_eof()
    with pytest.raises(IncompleteFrame):
        await conn.dispatch(CODEC.on_message(lambda _conn, message: got.append(message)))
    assert got == numbered(300)
    await peer.aclose()
    await conn.aclose()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (frames(b"whole"), CloseReason.PEER_EOF),
        (frames(b"whole", b"torn")[:-1], CloseReason.PROTOCOL_ERROR),
        (frames(b"whole") + b"\x7f\xff\xff\xff", CloseReason.PROTOCOL_ERROR),
    ],
    ids=["whole", "torn", "too large"],
)
async def test_how_a_connection_of_a_server_ends(data: bytes, reason: CloseReason) -> None:
    """EOF between two messages is PEER_EOF; inside one, or a frame too large: PROTOCOL_ERROR."""
    server = TcpServer(Callbacks(message=CODEC.on_message(echo)), 0, host="127.0.0.1")
    async with serving(server) as address:
        async with connect(address) as client:
            await client.send_all(data)
            assert await client.receive_some() == frames(b"whole")
            await client.send_eof()
            await until(lambda: server.statistics().closed)
        assert dict(server.statistics().closed) == {reason: 1}


async def test_too_large_a_frame(make_pair: MakePair) -> None:
    """FrameTooLarge comes out of dispatch, after the messages before it."""
    peer, conn = await make_pair()
    got: list[bytes] = []
    await peer.send_all(frames(*numbered(200)) + b"\x7f\xff\xff\xff")
    with pytest.raises(FrameTooLarge):
        await conn.dispatch(CODEC.on_message(lambda _conn, message: got.append(message)))
    assert got == numbered(200)
    await peer.aclose()
    await conn.aclose()


async def test_messages_left_over_at_eof(make_pair: MakePair) -> None:
    """A dispatch that finds the EOF read already gives all that was left over, in turns."""
    peer, conn = await make_pair()
    await peer.send_all(frames(*numbered(300)))
    await peer.send_eof()
    await conn.dispatch(lambda _conn, _buffer: None)
    got: list[bytes] = []
    await conn.dispatch(CODEC.on_message(lambda _conn, message: got.append(message)))
    assert got == numbered(300)
    await peer.aclose()
    await conn.aclose()


async def test_a_pause_among_messages_left_over_at_eof(make_pair: MakePair) -> None:
    """Paused then, dispatch does not end before the rest has been given."""
    peer, conn = await make_pair()
    await peer.send_all(frames(*numbered(3)))
    await peer.send_eof()
    await conn.dispatch(lambda _conn, _buffer: None)
    got: list[bytes] = []

    def pause(conn: TcpConnection, message: bytes) -> None:
        got.append(message)
        conn.stop_reading()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, CODEC.on_message(pause))
        for count in (1, 2, 3):
            await wait_all_tasks_blocked()
            assert len(got) == count
            conn.start_reading()
    await peer.aclose()
    await conn.aclose()


async def test_a_plain_callback_may_leave_bytes_at_eof(make_pair: MakePair) -> None:
    """Whoever reads next has them."""
    peer, conn = await make_pair()
    await peer.send_all(b"rest")
    await peer.send_eof()
    await conn.dispatch(lambda _conn, _buffer: None)
    assert await conn.receive_some() == b"rest"
    assert await conn.receive_some() == b""
    await peer.aclose()
    await conn.aclose()


# -- with the rest of the library


async def test_a_turn_does_not_fill_the_receive_buffer(make_pair: MakePair) -> None:
    """Many tiny frames in a small receive buffer are delivered, however many turns they take."""
    peer, conn = await make_pair(watermarks=Watermarks(receive_limit=2000))
    got: list[bytes] = []
    await peer.send_all(frames(*[b""] * 5000))
    await peer.send_eof()
    await conn.dispatch(CODEC.on_message(lambda _conn, message: got.append(message)))
    assert len(got) == 5000
    await peer.aclose()
    await conn.aclose()


async def test_a_message_larger_than_the_receive_limit(make_pair: MakePair) -> None:
    """The codec's own limit holds, in this mode as in the other: a frame as large as it allows is
    delivered, and a larger one is FrameTooLarge.
    """
    codec = LengthHeaderCodec(max_frame=300_000)
    peer, conn = await make_pair(watermarks=Watermarks(receive_limit=2000))
    got: list[bytes] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.send_all, codec.encode(bytes(300_000)) * 3 + codec.encode(b"last"))
        nursery.start_soon(conn.dispatch, codec.on_message(lambda _conn, m: got.append(m)))
        await until(lambda: len(got) == 4)
        nursery.cancel_scope.cancel()
    assert got == [bytes(300_000)] * 3 + [b"last"]
    await peer.send_all((300_001).to_bytes(4, "big"))
    with pytest.raises(FrameTooLarge):
        await conn.dispatch(codec.on_message(lambda *_: None))
    await peer.aclose()
    conn.force_close()


@pytest.mark.parametrize("before", [False, True], ids=["first", "after a codec"])
async def test_a_plain_callback_has_its_own_limit(before: bool, make_pair: MakePair) -> None:
    """`Watermarks.receive_limit` is for what a plain callback leaves, also where a codec was used
    on the connection before.
    """
    peer, conn = await make_pair(watermarks=Watermarks(receive_limit=2000))
    if before:
        with trio.CancelScope() as scope:
            await peer.send_all(frames(b"hello"))
            await conn.dispatch(CODEC.on_message(lambda *_: scope.cancel()))
    peer.send(bytes(100_000))
    with trio.fail_after(10), pytest.raises(ReceiveBufferFull, match="left 2000 bytes"):
        await conn.dispatch(lambda _conn, _buffer: None)
    conn.force_close()
    peer.force_close()


class GivesNone(LengthHeaderCodec):
    """Forgets to say NEED_MORE."""

    def decode(self, buffer: Buffer) -> bytes | NeedMore:
        message = super().decode(buffer)
        return cast("bytes", None) if message is NEED_MORE else message


class TakesNothing(LengthHeaderCodec):
    """Looks, and does not take."""

    def decode(self, buffer: Buffer) -> bytes | NeedMore:
        return bytes(buffer) or NEED_MORE


@pytest.mark.parametrize("codec", [GivesNone(), TakesNothing()])
async def test_a_codec_that_takes_nothing(codec: LengthHeaderCodec, make_pair: MakePair) -> None:
    """It does not spin for ever: after a turn, a RuntimeError that names the codec."""
    peer, conn = await make_pair()
    await peer.send_all(b"\0\0")
    got: list[object] = []
    told = rf"^{type(codec).__name__}\.decode gave .*NEED_MORE"
    with trio.fail_after(10), pytest.raises(RuntimeError, match=told):
        await conn.dispatch(codec.on_message(lambda _conn, message: got.append(message)))
    assert len(got) == 32
    conn.force_close()
    await peer.aclose()


@pytest.mark.parametrize("count", [1, 32, 33])
async def test_a_finished_message_has_no_deadline(
    count: int, make_pair: MakePair, mock_clock: trio.testing.MockClock
) -> None:
    """Once the message that was begun is whole, `Timeouts.frame` ends nothing."""
    peer, conn = await make_pair(timeouts=Timeouts(frame=5))
    got: list[bytes] = []
    data = frames(*numbered(count))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, CODEC.on_message(lambda _conn, m: got.append(m)))
        await peer.send_all(data[:3])
        await wait_all_tasks_blocked(0.01)
        await peer.send_all(data[3:])
        while len(got) < count:
            await wait_all_tasks_blocked()
        for _ in range(20):
            mock_clock.jump(1)
            await wait_all_tasks_blocked()
        assert conn.close_reason is None
        nursery.cancel_scope.cancel()
    await peer.aclose()
    await conn.aclose()


async def test_heartbeats_are_not_delivered(make_pair: MakePair) -> None:
    """`dispatch_messages` answers pings, and gives all the other messages."""
    peer, conn = await make_pair()
    beat = Heartbeat(ping=b"ping", is_ping=lambda message: message == b"ping", pong=b"pong")
    got: list[bytes] = []
    await peer.send_all(frames(b"a", b"ping", b"b"))
    await peer.send_eof()
    await dispatch_messages(conn, CODEC, lambda _conn, m: got.append(m), heartbeat=beat)
    assert got == [b"a", b"b"]
    assert await peer.receive_some() == frames(b"pong")
    await peer.aclose()
    await conn.aclose()


async def lose(conn: TcpConnection, message: bytes) -> None:
    """Nobody would await it."""


@pytest.mark.parametrize(
    ("callback", "told"), [(None, "pass a function of "), (lose, "nobody would await it: pass ")]
)
async def test_a_wrong_callback_beside_a_heartbeat(
    callback: Any, told: str, make_pair: MakePair
) -> None:
    """`dispatch_messages` refuses what is no plain function before it reads or asks anything."""
    peer, conn = await make_pair()
    beat = Heartbeat(ping=b"ping", interval=0.001, timeout=10)
    with pytest.raises(TypeError, match=rf"^dispatch_messages\(on_message=.*\): {told}"):
        await dispatch_messages(conn, CODEC, callback, heartbeat=beat)
    await conn.aclose()
    assert await everything(peer) == b""
    await peer.aclose()


async def test_pipelined_echo_waits_for_nothing(mock_clock: trio.testing.MockClock) -> None:
    """Batch after batch is answered while no time passes: no timer takes part."""
    server = TcpServer(Callbacks(message=CODEC.on_message(echo)), 0, host="127.0.0.1")
    batch = frames(*[bytes(100)] * 32)
    async with serving(server) as address, connect(address) as client:
        for _ in range(200):
            await client.send_all(batch)
            received = 0
            while received < len(batch):
                received += len(await client.receive_some())
            assert received == len(batch)
    assert trio.current_time() == 0


@pytest.mark.parametrize("last", [b"", b"\0\0", frames(b"raise")], ids=["whole", "torn", "raises"])
async def test_no_garbage(last: bytes) -> None:
    """Connections of a server are freed by their counts of references, however they end."""
    conns: list[weakref.ref[TcpConnection]] = []

    def remember(conn: TcpConnection) -> None:
        conns.append(weakref.ref(conn))

    def answer(conn: TcpConnection, message: bytes) -> None:
        if message == b"raise":
            raise ValueError(message)
        echo(conn, message)

    handler = Callbacks(message=CODEC.on_message(answer), connection=remember)
    # The capture of what is logged would keep the frames of the error.
    logging.getLogger("trioreactor.server").disabled = True
    gc.collect()
    gc.disable()
    try:
        # The watchdog looks at frames, and so may keep one longer than it runs.
        server = TcpServer(handler, 0, host="127.0.0.1", watchdog=None)
        async with serving(server) as address:
            for _ in range(20):
                async with connect(address) as client:
                    await client.send_all(frames(b"hello"))
                    assert await client.receive_some() == frames(b"hello")
                    await client.send_all(last)
                    await client.send_eof()
                    await everything(client)
        assert len(conns) == 40
        assert not [ref for ref in conns if ref() is not None]
    finally:
        gc.enable()
        logging.getLogger("trioreactor.server").disabled = False
