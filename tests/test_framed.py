"""FramedChannel: a connection as a channel of messages."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.conftest import (
    Pair,
    cancelled_after,
    connect,
    everything,
    fill,
    no_leaks,
    reset,
    serving,
    tcp_pair,
    until,
)
from tests.simulated import simulated
from trioreactor import (
    NEED_MORE,
    Buffer,
    CloseReason,
    Codec,
    FixedLengthCodec,
    FramedChannel,
    FrameTooLarge,
    Heartbeat,
    IncompleteFrame,
    JsonLinesCodec,
    LengthHeaderCodec,
    LineCodec,
    NeedMore,
    ProtocolError,
    SendBufferFull,
    TcpConnection,
    TcpServer,
    Watermarks,
    dispatch_messages,
)
from trioreactor.default_poller import current_poller

if TYPE_CHECKING:
    from typing import Self

CODEC = LengthHeaderCodec()
MakePair = Callable[..., Awaitable[Pair]]


def frames(*messages: bytes) -> bytes:
    """The messages as they go on the wire."""
    return b"".join(map(CODEC.encode, messages))


def numbered(count: int) -> list[bytes]:
    """So many different messages."""
    return [b"%d" % i for i in range(count)]


async def channel_pair(make_pair: MakePair, **options: object) -> tuple[TcpConnection, Channel]:
    """A peer, and a channel that it speaks to."""
    peer, conn = await make_pair(**options)
    return peer, FramedChannel(conn, CODEC)


Channel = FramedChannel[bytes]


async def everything_of(conn: TcpConnection) -> bytes:
    """What comes until EOF, within bounds."""
    with trio.fail_after(10):
        return b"".join([chunk async for chunk in conn])


class Steps(trio.abc.Instrument):
    """Counts how often this task is run."""

    def __init__(self) -> None:
        self._task = trio.lowlevel.current_task()
        self.count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += task is self._task

    def __enter__(self) -> Self:
        trio.lowlevel.add_instrument(self)
        return self

    def __exit__(self, *args: object) -> None:
        trio.lowlevel.remove_instrument(self)


# -- a trio.abc.Channel


async def test_it_is_a_channel(make_pair: MakePair) -> None:
    """Messages go both ways, `async for` ends at EOF, and nothing is left behind."""
    async with no_leaks():
        left, right = await make_pair()
        async with FramedChannel(left, CODEC) as a, FramedChannel(right, CODEC) as b:
            channel: trio.abc.Channel[bytes] = a
            for message in (b"one", b"", bytes(65536)):
                await channel.send(message)
                assert await b.receive() == message
            await b.send(b"back")
            assert await a.receive() == b"back"
            await a.send(b"last")
            await left.send_eof()
            assert [message async for message in b] == [b"last"]
            for _ in range(2):
                with pytest.raises(trio.EndOfChannel):
                    await b.receive()


async def test_a_closed_channel_gives_and_takes_nothing(make_pair: MakePair) -> None:
    """After `aclose` everything raises ClosedResourceError, with messages waiting, too."""
    peer, channel = await channel_pair(make_pair)
    await peer.send_all(frames(*numbered(300)))
    assert await channel.receive() == b"0"
    with trio.move_on_after(0):
        # It would wait for the peer's EOF: cancelled, it closes at once.
        await channel.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await channel.receive()
    with pytest.raises(trio.ClosedResourceError):
        await channel.send(b"x")
    with pytest.raises(trio.ClosedResourceError):
        channel.send_nowait(b"x")
    await peer.aclose()


async def test_a_forced_close_ends_a_batch(make_pair: MakePair) -> None:
    """No message is given after `force_close`, though decoded ones wait."""
    peer, channel = await channel_pair(make_pair)
    await peer.send_all(frames(*numbered(300)))
    assert await channel.receive() == b"0"
    channel.conn.force_close()
    with pytest.raises(trio.ClosedResourceError):
        await channel.receive()
    with pytest.raises(trio.ClosedResourceError):
        channel.send_nowait(b"x")
    await peer.aclose()


@pytest.mark.parametrize("eof", [False, True])
async def test_a_close_while_input_is_on_its_way(eof: bool) -> None:
    """What `receive` has read already when we close the connection is not given any more."""
    in_time = 0
    # Tasks that are ready run in any order, so not each close comes before the message.
    for _ in range(40):
        conn, sock = simulated()
        channel = FramedChannel(conn, CODEC)
        sock.peer_sends(frames(b"one", b"two") + b"\0")
        if eof:
            sock.peer_ends()
        # Else it would wait for it, and then give it at once.
        await wait_all_tasks_blocked()
        got: list[bytes | str] = []
        calls = sock.receive_calls
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def receive(channel: Channel = channel, got: list[bytes | str] = got) -> None:
                try:
                    got.append(await channel.receive())
                except trio.ClosedResourceError:
                    got.append("closed")

            with trio.fail_after(5):
                while sock.receive_calls == calls:
                    await trio.lowlevel.checkpoint()
            wanted = list(got) or ["closed"]
            in_time += not got
            conn.force_close()
        assert got == wanted
    assert in_time


async def test_closing_wakes_who_receives(make_pair: MakePair) -> None:
    """A task that waits in `receive` hears of `aclose` at once."""
    peer, channel = await channel_pair(make_pair)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def receive() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await channel.receive()

        await wait_all_tasks_blocked()
        await channel.aclose()
    await peer.aclose()


async def test_messages_before_a_reset_are_given() -> None:
    """After a reset what came before is given, then BrokenResourceError, again and again."""
    peer, channel = await channel_pair(tcp_pair)
    await peer.send_all(frames(*numbered(3)))
    assert await channel.receive() == b"0"
    stream, _ = peer.detach()
    reset(stream.socket)
    await wait_all_tasks_blocked(0.01)
    assert [await channel.receive(), await channel.receive()] == [b"1", b"2"]
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError):
            await channel.receive()
    with pytest.raises(trio.BrokenResourceError):
        channel.send_nowait(b"x")
    await channel.aclose()


async def test_only_one_task_may_receive(make_pair: MakePair) -> None:
    """The second hears BusyResourceError, and the first is still woken by a drain."""
    peer, channel = await channel_pair(make_pair)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def receive() -> None:
            with pytest.raises(trio.EndOfChannel):
                await channel.receive()

        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await channel.receive()
        channel.conn.start_draining()
    await channel.aclose()
    await peer.aclose()


# -- turns


async def test_messages_of_one_read_cost_no_switch_each() -> None:
    """10,000 messages in one burst: the others have their turn after each 32."""
    conn, sock = simulated()
    channel = FramedChannel(conn, CODEC)
    sock.peer_sends(frames(*[b"x"] * 10_000))
    with Steps() as steps:
        step, since = steps.count, 0
        for _ in range(10_000):
            await channel.receive()
            since = since + 1 if steps.count == step else 1
            step = steps.count
            assert since <= 32
    assert 2 * 10_000 / 32 - 2 <= steps.count <= 2 * 10_000 / 32 + 20
    await channel.aclose()


@pytest.mark.parametrize("waiting", [False, True])
async def test_sends_cost_no_switch_each(waiting: bool) -> None:
    """Of 6,400 sends that need not wait, each 64th gives the others their turn; O: also while
    further messages wait to be received.
    """
    conn, sock = simulated()
    channel = FramedChannel(conn, CODEC)
    if waiting:
        sock.peer_sends(frames(b"first", b"second"))
        assert await channel.receive() == b"first"
    with Steps() as steps:
        for _ in range(6400):
            await channel.send(b"x")
    assert steps.count == 100
    await channel.aclose()


async def test_what_a_codec_encodes_into_is_its_own() -> None:
    """One that encodes into the same bytearray each time sends what it was at each."""

    class Reusing(FixedLengthCodec):
        """The bytes of every message are the same object's."""

        def __init__(self) -> None:
            super().__init__(1)
            self.encoded = bytearray(1)

        def encode(self, message: bytes) -> bytes:
            self.encoded[:] = message
            return self.encoded  # type: ignore[return-value]

    conn, sock = simulated()
    channel = FramedChannel(conn, Reusing())
    sock.peer_sends(b"1234")
    for _ in range(4):
        await channel.send(await channel.receive())
    await channel.aclose()
    assert sock.output == b"1234"


async def test_only_heartbeats_in_a_turn(make_pair: MakePair) -> None:
    """A message behind a whole turn of pings is given, though nothing more comes."""
    peer, conn = await make_pair()
    beat = Heartbeat(ping=b"ping", is_ping=lambda message: message == b"ping", pong=b"pong")
    channel = FramedChannel(conn, CODEC, heartbeat=beat)
    await peer.send_all(frames(*[b"ping"] * 256, b"news"))
    with trio.fail_after(10):
        assert await channel.receive() == b"news"
    await channel.aclose()
    await peer.aclose()


# -- what leaves together


async def test_answers_to_a_burst_leave_in_one_write() -> None:
    """What is sent while more messages wait is one write, with the last answer."""
    conn, sock = simulated()
    channel = FramedChannel(conn, CODEC)
    sock.peer_sends(frames(*numbered(32)))
    for _ in range(32):
        await channel.send(await channel.receive())
    assert bytes(sock.output) == frames(*numbered(32))
    assert len(sock.writes) == 1
    await channel.aclose()


async def test_a_receive_that_waits_sends_first() -> None:
    """Answered or not, the last message of a burst holds no answer back."""
    conn, sock = simulated()
    channel = FramedChannel(conn, CODEC)
    sock.peer_sends(frames(*numbered(3)))
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def serve() -> None:
            for _ in range(2):
                await channel.send(await channel.receive())
            assert await channel.receive() == b"2"
            await channel.receive()

        await wait_all_tasks_blocked()
        assert bytes(sock.output) == frames(b"0", b"1")
        assert len(sock.writes) == 1
        nursery.cancel_scope.cancel()
    await channel.aclose()


async def test_nothing_is_left_behind_when_the_task_goes_on() -> None:
    """A handler that waits for something else in the middle of a burst holds no answer back."""
    conn, sock = simulated()
    channel = FramedChannel(conn, CODEC)
    sock.peer_sends(frames(*numbered(3)))
    await channel.send(await channel.receive())
    assert not sock.output
    await wait_all_tasks_blocked()
    assert bytes(sock.output) == frames(b"0")
    await channel.aclose()


async def test_gathering_is_bounded() -> None:
    """Large answers leave before 32 of them are together."""
    conn, sock = simulated()
    channel = FramedChannel(conn, CODEC)
    sock.peer_sends(frames(*numbered(100)))
    for _ in range(99):
        await channel.receive()
        await channel.send(bytes(32768))
    assert len(sock.writes) >= 33
    assert max(size for _, size in sock.writes) <= 65536 + 32768
    await channel.aclose()


async def test_order_is_kept_across_tasks() -> None:
    """What another task sends with `send_nowait` stands where it was sent, gathered or not."""
    conn, sock = simulated()
    channel = FramedChannel(conn, CODEC)
    sock.peer_sends(frames(*numbered(4)))
    sent = []
    async with trio.open_nursery() as nursery:
        for i in range(4):
            message = await channel.receive()
            await channel.send(message)

            @nursery.start_soon
            async def other(i: int = i) -> None:
                sent.append(b"other %d" % i)
                channel.send_nowait(sent[-1])

            sent.append(message)
            if i == 1:
                await trio.lowlevel.checkpoint()
    await wait_all_tasks_blocked()
    assert bytes(sock.output) == frames(*sent)
    await channel.aclose()


@pytest.mark.parametrize("end", ["return", "aclose", "shutdown", "send_eof"])
async def test_what_was_sent_leaves_before_the_end(end: str) -> None:
    """Answers gathered when the handler ends the connection still arrive, in front of its EOF."""

    async def handler(conn: TcpConnection) -> None:
        channel = FramedChannel(conn, CODEC)
        async for message in channel:
            await channel.send(message)
            if message == b"quit":
                if end == "aclose":
                    await channel.aclose()
                elif end == "shutdown":
                    conn.shutdown()
                elif end == "send_eof":
                    await conn.send_eof()
                return

    server = TcpServer(handler, 0, host="127.0.0.1")
    async with serving(server) as address, connect(address) as client:
        await client.send_all(frames(b"1", b"2", b"quit", b"more"))
        await client.send_eof()
        assert await everything(client) == frames(b"1", b"2", b"quit")


async def test_a_reply_that_fails_hides_no_message() -> None:
    """Gathered answers that find the peer gone cost none of the messages before the break."""
    conn, sock = simulated()
    channel = FramedChannel(conn, CODEC)
    sock.peer_sends(frames(*numbered(3)))
    got = [await channel.receive()]
    sock.peer_sends(frames(b"unread"))
    sock.peer_resets()
    assert channel.send_nowait(b"answer")
    with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
        while True:
            got.append(await channel.receive())
    assert got == [*numbered(3), b"unread"]
    await channel.aclose()


async def test_a_cancelled_turn_for_the_others_takes_nothing_back() -> None:
    """Cancelled in the turn that follows a send, the send has succeeded."""
    cancelled = 0
    # Tasks that are ready run in any order, so not each cancellation comes in that turn.
    for _ in range(40):
        conn, sock = simulated()
        channel = FramedChannel(conn, CODEC)
        sent: list[bytes] = []

        async def send(channel: Channel = channel, sent: list[bytes] = sent) -> None:
            for message in numbered(65):
                await channel.send(message)
                sent.append(message)

        cancelled += await cancelled_after(1, send)
        await channel.aclose()
        assert bytes(sock.output) == frames(*sent)
    assert cancelled


async def test_a_message_that_cannot_be_encoded() -> None:
    """ValueError, and nothing of it is sent; the channel goes on."""
    conn, sock = simulated()
    channel = FramedChannel(conn, CODEC)
    with pytest.raises(ValueError, match="a frame of"):
        await channel.send(bytes(65537))
    with pytest.raises(ValueError, match="a frame of"):
        channel.send_nowait(bytes(65537))
    await channel.send(b"good")
    assert bytes(sock.output) == frames(b"good")
    await channel.aclose()


# -- the order with what others send


@pytest.mark.parametrize("how", ["send", "send_all", "offer", "broadcast", "broadcast_dropping"])
async def test_nobody_overtakes_the_channel(how: str) -> None:
    """What is sent on the connection, or to all, stands where it was sent, pipelined or not."""

    async def handler(conn: TcpConnection) -> None:
        channel = FramedChannel(conn, CODEC)
        async for message in channel:
            await channel.send(b"answer to " + message)
            news = CODEC.encode(b"news of " + message)
            if how == "send":
                conn.send(news)
            elif how == "send_all":
                await conn.send_all(news)
            elif how == "offer":
                assert conn.offer(news) == 0
            else:
                assert server.broadcast(news) == 1

    dropping = how == "broadcast_dropping"
    server = TcpServer(
        handler, 0, host="127.0.0.1", overflow="drop_oldest" if dropping else "close"
    )
    messages = numbered(200)
    async with serving(server) as address, connect(address) as client:
        await client.send_all(frames(*messages))
        await client.send_eof()
        got = await everything(client)
    wanted = [what + message for message in messages for what in (b"answer to ", b"news of ")]
    assert got == frames(*wanted)


# -- going on as something else


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 64])
async def test_detach_gives_what_is_left(count: int, make_pair: MakePair) -> None:
    """Answers gathered leave first, and bytes behind the messages received come back, whichever
    the number of messages.
    """
    peer, channel = await channel_pair(make_pair)
    await peer.send_all(frames(*numbered(count)) + b"\0\0")
    for message in numbered(count):
        assert await channel.receive() == message
        channel.send_nowait(message)
    stream, unread = channel.detach()
    assert unread == b"\0\0"
    async with stream:
        await stream.send_all(b"raw")
        got = b""
        while len(got) < len(frames(*numbered(count))) + 3:
            got += await peer.receive_some()
        assert got == frames(*numbered(count)) + b"raw"
        with pytest.raises(trio.ClosedResourceError):
            await channel.receive()
        with pytest.raises(trio.ClosedResourceError):
            await channel.send(b"x")
    await peer.aclose()


@pytest.mark.parametrize("count", [2, 32, 33, 300])
async def test_detach_leaves_no_message(count: int, make_pair: MakePair) -> None:
    """BusyResourceError while messages wait, decoded or not; nothing is lost then, neither those
    nor what was sent, and once they are received it can be done.
    """
    peer, channel = await channel_pair(make_pair)
    messages = numbered(count)
    await peer.send_all(frames(*messages) + b"\0")
    got: list[bytes] = []
    for _ in messages[:-1]:
        got.append(await channel.receive())
        await channel.send(got[-1])
        with pytest.raises(trio.BusyResourceError, match="not received"):
            channel.detach()
        assert channel.conn.close_reason is None
    got.append(await channel.receive())
    assert got == messages
    stream, unread = channel.detach()
    assert unread == b"\0"
    await stream.aclose()
    assert await everything_of(peer) == frames(*messages[:-1])
    await peer.aclose()


async def test_a_failed_detach_loses_nothing(make_pair: MakePair) -> None:
    """Refused since data is queued, or a task receives: the beginning of a message stays."""
    peer, conn = await make_pair()
    channel = FramedChannel(conn, CODEC)
    data = frames(b"one", b"two", b"three")
    await peer.send_all(data[:9])
    assert await channel.receive() == b"one"
    sent = await fill(conn)
    with pytest.raises(trio.BusyResourceError, match="still queued"):
        channel.detach()
    with trio.fail_after(20):
        while sent:
            sent -= len(await peer.receive_some())
    got: list[bytes] = []
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def receive() -> None:
            got.append(await channel.receive())

        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError, match="receiving"):
            channel.detach()
        await peer.send_all(data[9:15])
    assert got == [b"two"]
    stream, unread = channel.detach()
    assert unread == data[14:15]
    await stream.aclose()
    await peer.aclose()


# -- cancelling


async def test_a_cancelled_receive_loses_nothing(make_pair: MakePair) -> None:
    """Cancelled at each of its steps, with frames that come in pieces: all come, once."""
    peer, channel = await channel_pair(make_pair)
    messages = numbered(400)
    data = frames(*messages)
    got: list[bytes] = []

    async def receive() -> None:
        got.append(await channel.receive())

    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            for start in range(0, len(data), 700):
                await peer.send_all(data[start : start + 700])
                for _ in range(start % 3):
                    await trio.lowlevel.checkpoint()

        with trio.fail_after(20):
            while len(got) < len(messages):
                for turns in range(4):
                    await cancelled_after(turns, receive)
    assert got == messages
    await channel.aclose()
    await peer.aclose()


async def test_a_cancelled_send_is_whole_or_nothing() -> None:
    """Cancelled at each of its steps, congested or not: what did not raise is sent, once."""
    sent: list[bytes] = []
    cancelled = 0
    conn, sock = simulated(room=0, watermarks=Watermarks(high=100, low=10))
    channel = FramedChannel(conn, CODEC)
    for i in range(300):

        async def send(message: bytes = b"%050d" % i) -> None:
            await channel.send(message)
            sent.append(message)

        if i % 3 == 0:
            sock.peer_takes(60)
        cancelled += await cancelled_after(i % 5, send)
    assert cancelled > 100
    assert len(sent) > 50
    sock.peer_takes(1 << 20)
    await wait_all_tasks_blocked()
    assert bytes(sock.output) == frames(*sent)
    await channel.aclose()


# -- several senders, and congestion


async def test_several_tasks_send(make_pair: MakePair) -> None:
    """Each task's messages come whole and in its order, through congestion."""
    peer, conn = await make_pair(watermarks=Watermarks(high=4096, low=1024))
    channel, theirs = FramedChannel(conn, CODEC), FramedChannel(peer, CODEC)
    got: dict[bytes, list[int]] = {b"%d" % i: [] for i in range(8)}
    async with trio.open_nursery() as nursery:
        for name in got:

            @nursery.start_soon
            async def send(name: bytes = name) -> None:
                for i in range(100):
                    await channel.send(name + b" %d " % i + bytes(20_000))

        with trio.fail_after(20):
            for _ in range(800):
                name, number, rest = (await theirs.receive()).split(b" ", 2)
                assert rest == bytes(20_000)
                got[name].append(int(number))
    assert all(numbers == list(range(100)) for numbers in got.values())
    assert conn.statistics().pauses > 0
    await channel.aclose()
    await peer.aclose()


async def test_congestion_holds_send_back() -> None:
    """`send` waits until the low mark, any number of tasks; `send_nowait` answers False."""
    conn, sock = simulated(room=0, watermarks=Watermarks(high=100, low=10))
    channel = FramedChannel(conn, CODEC)
    assert channel.send_nowait(bytes(60))
    assert not conn.congested
    assert not channel.send_nowait(bytes(60))
    assert conn.congested
    done = []
    async with trio.open_nursery() as nursery:
        for i in range(3):

            @nursery.start_soon
            async def send(i: int = i) -> None:
                await channel.send(bytes(97))
                done.append(i)

        await wait_all_tasks_blocked()
        assert not done
        sock.peer_takes(117)  # one byte above the low mark
        await wait_all_tasks_blocked()
        assert not done
        sock.peer_takes(1)
        await wait_all_tasks_blocked()
        # The first one's message congests it again, and the others still wait.
        assert len(done) == 1
        sock.peer_takes(1 << 20)
    assert len(done) == 3
    assert channel.send_nowait(b"x")
    await channel.aclose()


async def test_wait_uncongested_is_for_any_number() -> None:
    """`wait_uncongested` waits for the low mark, in several tasks, and hears of the close."""
    conn, sock = simulated(room=0, watermarks=Watermarks(high=100, low=10))
    await conn.wait_uncongested()
    await fill(conn, 60)
    done = []

    async def wait() -> None:
        await conn.wait_uncongested()
        done.append("uncongested")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert not done
        sock.peer_takes(110)
    assert len(done) == 2
    assert not conn.congested
    await fill(conn, 60000)
    sock.room = 0
    heard: list[bool] = []
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def hear() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await conn.wait_uncongested()
            heard.append(True)

        await wait_all_tasks_blocked()
        nursery.start_soon(conn.aclose)
        await wait_all_tasks_blocked()
        assert heard
        conn.force_close()


async def test_send_waits_for_room_under_the_limit() -> None:
    """A message that would pass `Watermarks.limit` waits, though nothing is congested; and of
    several that wait each comes in its turn.
    """
    conn, sock = simulated(room=0, watermarks=Watermarks(high=1000, low=100, limit=1200))
    channel = FramedChannel(conn, CODEC)
    await channel.send(bytes(900))
    assert not conn.congested
    done: list[int] = []
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for i in range(4):

                @nursery.start_soon
                async def send(i: int = i) -> None:
                    await channel.send(bytes([i]) * 900)
                    done.append(i)

            await wait_all_tasks_blocked()
            assert not done
            for count in (1, 2, 3, 4):
                sock.peer_takes(904)
                await wait_all_tasks_blocked()
                assert len(done) == count
    sock.peer_takes(904)
    await wait_all_tasks_blocked()
    assert bytes(sock.output) == frames(bytes(900), *[bytes([i]) * 900 for i in done])
    await channel.aclose()


async def test_awaited_sends_never_pass_the_limit() -> None:
    """Whoever awaits each send is never a SLOW_CONSUMER's sender: bursts are answered with more
    than the limit, of which a part is gathered, and the queue stays within it.
    """
    marks = Watermarks(high=32768, low=16384, limit=65536)
    conn, sock = simulated(room=10_000, watermarks=marks)
    channel = FramedChannel(conn, CODEC)
    most = 0
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def answer() -> None:
            async for message in channel:
                await channel.send(message * 3)

        messages = [b"%05d" % i * (i % 13 * 100) for i in range(1000)]
        sock.peer_sends(frames(*messages))
        sock.peer_ends()
        wanted = frames(*[message * 3 for message in messages])
        while len(sock.output) < len(wanted) and conn.close_reason is None:
            most = max(most, conn.buffered)
            sock.peer_takes(7000)
            await wait_all_tasks_blocked()
    assert bytes(sock.output) == wanted
    assert 32768 < most <= 65536
    await channel.aclose()


async def test_what_is_gathered_makes_room() -> None:
    """A send that has no room beside the answers gathered before it lets those go, and follows."""
    conn, sock = simulated(watermarks=Watermarks(high=1000, low=100, limit=1024))
    channel = FramedChannel(conn, CODEC)
    sock.peer_sends(frames(b"0", b"1", b"2"))
    assert await channel.receive() == b"0"
    with trio.fail_after(5):
        await channel.send(bytes(600))
        assert not sock.output
        await channel.send(bytes(800))
    await wait_all_tasks_blocked()
    assert bytes(sock.output) == frames(bytes(600), bytes(800))
    await channel.aclose()


async def test_who_waits_hears_that_what_was_gathered_has_gone() -> None:
    """`wait_uncongested` of another task ends when the gathered bytes in its way have left."""
    conn, sock = simulated(watermarks=Watermarks(high=1000, low=100, limit=1024))
    conn.cork()
    conn.send(bytes(600))
    assert not conn.takes(800)
    with trio.fail_after(5):
        await conn.wait_uncongested(800)
    assert len(sock.output) == 600
    conn.force_close()


async def test_a_message_larger_than_the_limit_goes_alone() -> None:
    """What can never have room is streamed, at the pace of a peer that takes it slowly, and those
    who send meanwhile come after it.
    """
    conn, sock = simulated(room=10, watermarks=Watermarks(high=1000, low=100, limit=1200))
    channel = FramedChannel(conn, CODEC)
    sent: list[bytes] = []

    async def send(message: bytes) -> None:
        await channel.send(message)
        sent.append(message)

    large = [bytes([i]) * 5000 for i in (1, 2)]
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for message in (large[0], b"small", large[1]):
                nursery.start_soon(send, message)
                await wait_all_tasks_blocked()
            assert not sent
            with pytest.raises(trio.BusyResourceError):
                channel.send_nowait(b"between")
            for _ in range(300):
                sock.peer_takes(50)
                await wait_all_tasks_blocked()
    assert sent[0] == large[0]
    assert sorted(sent) == sorted([*large, b"small"])
    await channel.aclose()
    assert bytes(sock.output) == frames(*sent)


async def test_a_streamed_message_that_is_cancelled() -> None:
    """A part of it may be on its way: that breaks the connection, as with `send_all`."""
    conn, _ = simulated(room=10, watermarks=Watermarks(high=1000, low=100, limit=1200))
    channel = FramedChannel(conn, CODEC)
    with trio.move_on_after(0.01):
        await channel.send(bytes(5000))
    with pytest.raises(trio.BrokenResourceError):
        await channel.send(b"next")
    assert conn.close_reason is CloseReason.CANCELLED


async def test_nowait_says_what_is_wrong_with_a_large_one() -> None:
    """`send_nowait` cannot stream, and says what can."""
    conn, _ = simulated(room=0, watermarks=Watermarks(high=1000, low=100, limit=1200))
    channel = FramedChannel(conn, CODEC)
    with pytest.raises(
        SendBufferFull, match=r"5004 bytes are more than the limit of 1200.*send_all"
    ):
        channel.send_nowait(bytes(5000))
    assert conn.close_reason is CloseReason.SLOW_CONSUMER


@pytest.mark.parametrize("nowait", [False, True])
async def test_sends_in_a_row_leave_together(nowait: bool) -> None:
    """Of many messages that a task sends with nothing to answer, the first leaves at once, for it
    may be the only one, and the others together.
    """
    conn, sock = simulated()
    channel = FramedChannel(conn, CODEC)
    messages = numbered(60)
    for message in messages:
        if nowait:
            channel.send_nowait(message)
        else:
            await channel.send(message)
    assert bytes(sock.output) == frames(messages[0])
    await wait_all_tasks_blocked()
    assert bytes(sock.output) == frames(*messages)
    assert len(sock.writes) == 2
    await channel.send(b"later")
    assert len(sock.writes) == 3
    await channel.aclose()


async def test_corked_by_its_user() -> None:
    """`TcpConnection.cork` holds for what a channel sends, until `flush`."""
    conn, sock = simulated()
    channel = FramedChannel(conn, CODEC)
    conn.cork()
    for message in numbered(20):
        channel.send_nowait(message)
    assert not sock.writes
    channel.flush()
    assert bytes(sock.output) == frames(*numbered(20))
    assert len(sock.writes) == 1
    await channel.aclose()


@pytest.mark.parametrize("error", [ProtocolError("no such word"), ValueError("a mistake")])
@pytest.mark.parametrize("burst", [(b"bad",), (b"bad", b"next"), (b"a", b"bad", b"next")])
async def test_what_was_sent_before_an_error_leaves(error: Exception, burst: list[bytes]) -> None:
    """Answers that a handler has sent are not lost with it, gathered or not."""

    async def handler(conn: TcpConnection) -> None:
        channel = FramedChannel(conn, CODEC)
        async for message in channel:
            await channel.send(b"answer to " + message)
            if message == b"bad":
                raise error

    server = TcpServer(handler, 0, host="127.0.0.1")
    async with serving(server) as address, connect(address) as client:
        await client.send_all(frames(*burst))
        got = bytearray()
        with trio.fail_after(5), suppress(trio.BrokenResourceError):
            while chunk := await client.receive_some():
                got += chunk
        answers = [b"answer to " + message for message in burst[: burst.index(b"bad") + 1]]
        assert got == frames(*answers)


async def test_what_was_sent_before_garbage_leaves() -> None:
    """Nor are they with the peer's own mistake, found behind messages that were not answered."""
    conn, sock = simulated()
    channel = FramedChannel(conn, LineCodec("ascii"))
    sock.peer_sends(b"one\ntwo\n\xff\n")
    await channel.send(await channel.receive())
    assert await channel.receive() == "two"
    assert not sock.output
    with pytest.raises(ProtocolError):
        await channel.receive()
    assert bytes(sock.output) == b"one\n"
    await channel.aclose()


@pytest.mark.parametrize(
    ("queued", "size", "takes"),
    [(0, 0, True), (0, 960, True), (0, 961, True), (50, 846, True), (50, 847, False),
     (50, 961, True), (101, 0, False), (101, 961, False)],
)  # fmt: skip
async def test_what_a_connection_takes(queued: int, size: int, takes: bool) -> None:
    """`takes`: not congested, and there is room now or never will be; corked it counts the same."""
    marks = Watermarks(high=100, low=10, limit=1024)
    for corked in (False, True):
        conn, _ = simulated(room=0, watermarks=marks)
        if corked:
            conn.cork()
        if queued:
            conn.send(bytes(queued))
        assert conn.takes(size) is takes
        conn.force_close()


async def test_waiting_for_room_hears_of_the_end() -> None:
    """One who waits for room, though nothing is congested, hears of the close and of a break."""
    errors = {"close": trio.ClosedResourceError, "reset": trio.BrokenResourceError}
    for how in errors:
        conn, sock = simulated(room=0, watermarks=Watermarks(high=1000, low=100, limit=1200))
        conn.send(bytes(900))
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def wait(conn: TcpConnection = conn, how: str = how) -> None:
                    with pytest.raises(errors[how]):
                        await conn.wait_uncongested(900)

                await wait_all_tasks_blocked()
                if how == "close":
                    conn.force_close()
                else:
                    sock.peer_resets()
        conn.force_close()


async def test_who_does_not_wait_fills_the_buffer() -> None:
    """`send_nowait` past the hard limit: SendBufferFull, and the connection ends."""
    conn, _ = simulated(room=0, watermarks=Watermarks(high=100, low=10, limit=4096))
    channel = FramedChannel(conn, CODEC)
    with pytest.raises(SendBufferFull):
        for _ in range(100):
            channel.send_nowait(bytes(1000))
    assert conn.close_reason is CloseReason.SLOW_CONSUMER
    with pytest.raises(trio.BrokenResourceError):
        await channel.receive()


# -- draining


async def test_a_drain_ends_a_receive_that_waits(make_pair: MakePair) -> None:
    """Between two messages a drain is the end of the channel, for one who waits, and later."""
    peer, channel = await channel_pair(make_pair)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def receive() -> None:
            assert [message async for message in channel] == []

        await wait_all_tasks_blocked()
        channel.conn.start_draining()
    with pytest.raises(trio.EndOfChannel):
        await channel.receive()
    await channel.aclose()
    await peer.aclose()


async def test_a_drain_finishes_the_message_begun(make_pair: MakePair) -> None:
    """A message of which a part is here is waited for, and what came with it is given."""
    peer, channel = await channel_pair(make_pair)
    data = frames(b"first", b"second", b"third")
    await peer.send_all(data[:11])
    got: list[bytes] = []
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def receive() -> None:
            async for message in channel:
                got.append(message)

        await until(lambda: got == [b"first"])
        await wait_all_tasks_blocked()
        channel.conn.start_draining()
        await wait_all_tasks_blocked()
        assert got == [b"first"]
        await peer.send_all(data[11:])
    assert got == [b"first", b"second", b"third"]
    await channel.aclose()
    await peer.aclose()


async def test_a_drain_gives_what_is_here(make_pair: MakePair) -> None:
    """More messages than one turn's, read before the drain, are all given."""
    peer, channel = await channel_pair(make_pair)
    await peer.send_all(frames(*numbered(300)))
    got = [await channel.receive()]
    channel.conn.start_draining()
    got += [message async for message in channel]
    assert got == numbered(300)
    await channel.aclose()
    await peer.aclose()


async def test_a_drain_of_a_peer_that_never_pauses() -> None:
    """It ends the channel behind the message that was begun, and what it is in then is no error."""
    conn, sock = simulated()
    channel = FramedChannel(conn, CODEC)
    data = frames(b"first", b"second", b"third", b"fourth")
    sock.peer_sends(data[:11])
    assert await channel.receive() == b"first"
    conn.start_draining()
    # As nearly each read of a stream, it ends inside a message.
    sock.peer_sends(data[11:-3])
    assert await channel.receive() == b"second"
    assert await channel.receive() == b"third"
    for _ in range(2):
        sock.peer_sends(data[:11])
        with pytest.raises(trio.EndOfChannel):
            await channel.receive()
    conn.force_close()


async def test_a_drain_of_a_server_with_a_busy_peer() -> None:
    """A client that pipelines without a pause does not hold up a drain: nobody is forced."""
    ended: list[BaseException | None] = []
    received: list[int] = [0]

    async def handler(conn: TcpConnection) -> None:
        try:
            async for message in FramedChannel(conn, CODEC):
                assert len(message) == 1001
                received[0] += 1
        except BaseException as error:
            ended.append(error)
            raise
        ended.append(None)

    server = TcpServer(handler, 0, host="127.0.0.1")
    burst = frames(bytes(1001)) * 100
    async with (
        serving(server) as address,
        connect(address) as client,
        trio.open_nursery() as nursery,
    ):

        @nursery.start_soon
        async def flood() -> None:
            with suppress(trio.BrokenResourceError):
                # Not in step with the messages.
                await client.send_all(burst[:700])
                while True:
                    await client.send_all(burst[700:] + burst[:700])

        await until(lambda: received[0] > 100)
        with trio.fail_after(20):
            report = await server.drain(40)
        nursery.cancel_scope.cancel()
    assert (report.finished, report.forced) == (1, ())
    assert ended == [None]


@pytest.mark.parametrize("how", ["force_close", "aclose"])
async def test_a_drained_channel_that_is_closed(how: str, make_pair: MakePair) -> None:
    """Closed by us after it drained, `receive` says so, again and again."""
    peer, channel = await channel_pair(make_pair)
    channel.conn.start_draining()
    with pytest.raises(trio.EndOfChannel):
        await channel.receive()
    if how == "force_close":
        channel.conn.force_close()
    else:
        await channel.aclose()
    for _ in range(2):
        with trio.fail_after(5), pytest.raises(trio.ClosedResourceError):
            await channel.receive()
    await peer.aclose()


# -- what peers do wrong


async def test_eof_inside_a_message(make_pair: MakePair) -> None:
    """IncompleteFrame after the whole messages, again and again."""
    peer, channel = await channel_pair(make_pair)
    await peer.send_all(frames(b"whole", b"torn")[:-1])
    await peer.send_eof()
    assert await channel.receive() == b"whole"
    for _ in range(2):
        with pytest.raises(IncompleteFrame):
            await channel.receive()
    await channel.aclose()
    await peer.aclose()


async def test_too_large_a_frame(make_pair: MakePair) -> None:
    """FrameTooLarge after all messages before it, and ever after; more input changes nothing."""
    peer, channel = await channel_pair(make_pair)
    await peer.send_all(frames(*numbered(200)) + (1 << 30).to_bytes(4, "big"))
    assert [await channel.receive() for _ in range(200)] == numbered(200)
    depths = []
    for _ in range(3):
        with pytest.raises(FrameTooLarge) as caught:
            await channel.receive()
        depths.append(len(caught.traceback))
        await peer.send_all(frames(b"more"))
    assert len(set(depths)) == 1, "it gathers traceback"
    channel.conn.force_close()
    await peer.aclose()


async def test_a_wrong_peer_ends_its_connection_only() -> None:
    """A handler that lets the error out ends the connection with PROTOCOL_ERROR."""

    async def handler(conn: TcpConnection) -> None:
        async for _ in FramedChannel(conn, CODEC):
            pass

    server = TcpServer(handler, 0, host="127.0.0.1")
    async with serving(server) as address:
        async with connect(address) as client:
            await client.send_all(b"\x7f\xff\xff\xff")
            await until(lambda: server.statistics().closed)
        assert dict(server.statistics().closed) == {CloseReason.PROTOCOL_ERROR: 1}


async def test_a_decoder_that_refuses_a_mapped_message(make_pair: MakePair) -> None:
    """What `map`'s decoder raises is a ProtocolError, after the messages before it."""
    peer, conn = await make_pair()
    channel = FramedChannel(conn, CODEC.map(lambda number: b"%d" % number, int))
    await peer.send_all(frames(b"1", b"2", b"three", b"4"))
    assert [await channel.receive(), await channel.receive()] == [1, 2]
    for _ in range(2):
        with pytest.raises(ProtocolError):
            await channel.receive()
    await channel.aclose()
    await peer.aclose()


class Numbered(ProtocolError):
    """A user's own, that is not made from its text."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"{number}: {text}")
        self.number = number


class Refusing(LengthHeaderCodec):
    """Refuses in a user's own way."""

    def decode(self, buffer: Buffer) -> bytes | NeedMore:
        message = super().decode(buffer)
        if message == b"bad":
            raise Numbered(42, "it is bad")
        return message


async def test_an_error_is_raised_as_it_was_each_time(make_pair: MakePair) -> None:
    """A codec's own error keeps its type, its text and its attributes, however it is constructed;
    each receive raises one, and their tracebacks do not grow.
    """
    peer, conn = await make_pair()
    channel = FramedChannel(conn, Refusing())
    await peer.send_all(frames(b"good", b"bad"))
    assert await channel.receive() == b"good"
    lengths = set()
    for _ in range(3):
        with pytest.raises(Numbered, match=r"^42: it is bad$") as caught:
            await channel.receive()
        assert caught.value.number == 42
        lengths.add(len(caught.traceback))
    assert len(lengths) == 1
    await channel.aclose()
    await peer.aclose()


async def test_the_cause_of_an_error_is_told(make_pair: MakePair) -> None:
    """What a mapped decoder raised is the cause of each ProtocolError."""
    peer, conn = await make_pair()
    channel = FramedChannel(conn, CODEC.map(lambda number: b"%d" % number, int))
    await peer.send_all(frames(b"three"))
    for _ in range(2):
        with pytest.raises(ProtocolError, match="cannot be decoded") as caught:
            await channel.receive()
        assert isinstance(caught.value.__cause__, ValueError)
    await channel.aclose()
    await peer.aclose()


# -- mistakes


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
async def test_a_codec_that_takes_nothing(codec: Codec[bytes], make_pair: MakePair) -> None:
    """It does not spin, nor give the same for ever: a RuntimeError names the codec."""
    peer, conn = await make_pair()
    channel = FramedChannel(conn, codec)
    await peer.send_all(b"\0\0")
    told = rf"^{type(codec).__name__}\.decode gave .*NEED_MORE"
    with trio.fail_after(10), pytest.raises(RuntimeError, match=told):
        for _ in range(1000):
            await channel.receive()
    conn.force_close()
    await peer.aclose()


async def test_what_is_no_codec_and_no_heartbeat() -> None:
    """Whoever passes something else, the class among it, reads at once what to pass."""
    conn, _ = simulated()
    with pytest.raises(TypeError, match=r"FramedChannel\(codec=<class .*\): pass a Codec"):
        FramedChannel(conn, LineCodec)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"FramedChannel\(heartbeat=5\): pass a Heartbeat"):
        FramedChannel(conn, CODEC, heartbeat=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dispatch_messages\(codec=5\): pass a Codec"):
        await dispatch_messages(conn, 5, print, heartbeat=Heartbeat(ping=b""))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dispatch_messages\(heartbeat=5\): pass a Heartbeat"):
        await dispatch_messages(conn, CODEC, print, heartbeat=5)  # type: ignore[arg-type]
    # None of these took the connection over.
    channel = FramedChannel(conn, CODEC)
    await channel.send(b"fine")
    await channel.aclose()


# -- garbage


@pytest.mark.parametrize(
    ("codec", "data"),
    [
        (CODEC, frames(b"fine") + b"\x7f\xff\xff\xff"),
        (LineCodec(), b"fine\n\xff\n"),
        (JsonLinesCodec(), b"1\n{\n"),
        (CODEC.map(lambda number: b"%d" % number, int), frames(b"3", b"three")),
    ],
    ids=["too large", "no text", "no JSON", "no number"],
)
@pytest.mark.parametrize("received", [False, True], ids=["not received", "received"])
async def test_an_error_before_a_reset_is_no_garbage(
    codec: Codec[Any], data: bytes, received: bool
) -> None:
    """A connection that the peer resets after its mistake is freed, with its channel, by the counts
    of references; whether the error was raised, or still waits behind a message.
    """
    if not current_poller().always_armed:
        pytest.skip("a reset is seen only by who reads")
    channels: list[weakref.ref[FramedChannel[Any]]] = []

    async def handler(conn: TcpConnection) -> None:
        channel = FramedChannel(conn, codec)
        channels.append(weakref.ref(channel))
        await channel.receive()
        if received:
            with suppress(ProtocolError):
                await channel.receive()
        await conn.wait_closed()

    gc.collect()
    gc.disable()
    try:
        server = TcpServer(handler, 0, host="127.0.0.1", watchdog=None)
        async with serving(server) as address:
            for turn in range(1, 4):
                client = connect(address)
                await client.send_all(data)
                await until(lambda turn=turn: len(channels) == turn)
                await wait_all_tasks_blocked(0.01)
                reset(client.socket)
                await until(lambda: not server.connections)
            # Before the server closes, for a close of ours forgets everything.
            assert dict(server.statistics().closed) == {CloseReason.PEER_RESET: 3}
            await wait_all_tasks_blocked()
            assert not [ref for ref in channels if ref() is not None]
    finally:
        gc.enable()


async def test_no_garbage() -> None:
    """50 channels of a server, errors among them, are freed by their counts of references."""
    channels: list[weakref.ref[Channel]] = []

    async def handler(conn: TcpConnection) -> None:
        channel = FramedChannel(conn, CODEC)
        channels.append(weakref.ref(channel))
        try:
            async for message in channel:
                await channel.send(message)
        except ProtocolError:
            pass

    gc.collect()
    gc.disable()
    try:
        async with serving(TcpServer(handler, 0, host="127.0.0.1", watchdog=None)) as address:
            for i in range(50):
                async with connect(address) as client:
                    await client.send_all(frames(b"hello"))
                    assert await client.receive_some() == frames(b"hello")
                    await client.send_all(b"\x7f\xff\xff\xff" if i % 2 else b"\x00")
                    await client.send_eof()
                    await everything(client)
        assert len(channels) == 50
        assert not [ref for ref in channels if ref() is not None]
    finally:
        gc.enable()
