"""ReadHalf: what comes is handed out whole and in order, in both modes and between them."""

from __future__ import annotations

import contextvars
import errno
import signal
import socket
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from tests.conftest import Pair, no_leaks, tcp_pair, unix_pair, until
from tests.simulated import simulated
from trioreactor import CloseReason, ReceiveBufferFull, TcpConnection, Timeouts, Watermarks
from trioreactor.buffer import Buffer
from trioreactor.default_poller import current_poller
from trioreactor.read_half import RECEIVE_SIZE

MakePair = Callable[..., Awaitable[Pair]]

settled = trio.testing.wait_all_tasks_blocked


async def read_to_end(conn: TcpConnection) -> bytes:
    """All that comes until EOF."""
    got = bytearray()
    async for chunk in conn:
        got += chunk
    return bytes(got)


def close(*conns: TcpConnection) -> None:
    """Close them all."""
    for conn in conns:
        conn.force_close()


# -- coroutine mode


@pytest.mark.parametrize("size", [1, 3, 10, None])
async def test_receive_some_sizes(
    make_pair: Callable[..., Awaitable[Pair]], size: int | None
) -> None:
    """At most as much as was asked for comes, nothing is lost between, and then EOF every time."""
    left, right = await make_pair()
    left.send(b"0123456789")
    await left.send_eof()
    chunks = []
    while chunk := await right.receive_some(size):
        chunks.append(chunk)
    assert b"".join(chunks) == b"0123456789"
    assert all(len(chunk) <= (size or 10) for chunk in chunks)
    assert len(chunks) == -(-10 // (size or 10))
    for _ in range(3):
        assert await right.receive_some(size) == b""
    assert right.statistics().bytes_received == 10
    close(left, right)


@pytest.mark.parametrize(
    ("size", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("1", TypeError)]
)
async def test_receive_some_refuses(size: object, error: type[Exception]) -> None:
    """A size that makes no sense is refused, and nothing is read."""
    left, right = await unix_pair()
    left.send(b"x")
    with pytest.raises(error):
        await right.receive_some(size)  # type: ignore[arg-type]
    assert await right.receive_some() == b"x"
    close(left, right)


async def test_two_readers() -> None:
    """A second reader, in either mode, is refused; the first one goes on."""
    left, right = await unix_pair()
    for first in (right.receive_some, lambda: right.dispatch(lambda conn, buffer: None)):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first)
                await settled()
                with pytest.raises(trio.BusyResourceError):
                    await right.receive_some()
                with pytest.raises(trio.BusyResourceError):
                    await right.dispatch(lambda conn, buffer: None)
                scope.cancel()
    left.send(b"x")
    assert await right.receive_some() == b"x"
    close(left, right)


@pytest.mark.parametrize("mode", ["coroutine", "dispatch"])
async def test_stop_reading_while_waiting(
    make_pair: Callable[..., Awaitable[Pair]], mode: str
) -> None:
    """A reader that waits gets nothing while reading is stopped, and all of it afterwards."""
    left, right = await make_pair()
    got: list[bytes] = []

    async def receive() -> None:
        if mode == "coroutine":
            got.append(await right.receive_some())
        else:
            await right.dispatch(lambda conn, buffer: got.append(buffer.take()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await settled()
        right.stop_reading()
        right.stop_reading()
        assert not right.reading
        left.send(b"while stopped")
        await settled(0.01)
        assert got == []
        right.start_reading()
        right.start_reading()
        assert right.reading
        await until(lambda: got)
        nursery.cancel_scope.cancel()
    assert got == [b"while stopped"]
    close(left, right)


async def test_stopped_before_reading() -> None:
    """`receive_some` waits when reading was stopped before, though input is there."""
    left, right = await unix_pair()
    right.stop_reading()
    left.send(b"x")
    await settled(0.01)
    with trio.move_on_after(0.02) as scope:
        await right.receive_some()
    assert scope.cancelled_caught
    right.start_reading()
    assert await right.receive_some() == b"x"
    close(left, right)


@pytest.mark.parametrize("size", [1, 1000, None])
async def test_a_reset_with_unread_data(size: int | None) -> None:
    """In coroutine mode all that came before a reset is read; then comes the error, every time."""
    left, right = await tcp_pair()
    left.send(b"x" * 5000)
    await settled(0.01)
    left.force_close(reset=True)
    await settled(0.01)
    got = 0
    with pytest.raises(trio.BrokenResourceError):
        while True:
            got += len(await right.receive_some(size))
    assert got == 5000
    assert right.close_reason is CloseReason.PEER_RESET
    with pytest.raises(trio.BrokenResourceError):
        await right.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        await right.dispatch(lambda conn, buffer: None)


async def test_reading_while_aclose_lingers() -> None:
    """Somebody who comes to read while we close is told so, not that somebody else reads."""
    left, right = await tcp_pair(timeouts=Timeouts(linger=5))
    left.send(b"unread")
    await settled(0.01)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(right.aclose)
        await settled(0.01)
        assert right.close_reason is None
        with pytest.raises(trio.ClosedResourceError):
            await right.receive_some()
        with pytest.raises(trio.ClosedResourceError):
            await right.dispatch(lambda conn, buffer: None)
        left.force_close()


# -- dispatch mode


@pytest.mark.parametrize("piece", [1, 1000, RECEIVE_SIZE, RECEIVE_SIZE + 1])
async def test_dispatch_hands_out_everything(
    make_pair: Callable[..., Awaitable[Pair]], piece: int
) -> None:
    """Whatever the pieces, the callback sees all bytes in order; dispatch returns at EOF."""
    async with no_leaks():
        left, right = await make_pair()
        total = bytes(range(256)) * (1 if piece == 1 else 2000)
        got = bytearray()

        async def send() -> None:
            for start in range(0, len(total), piece):
                await left.send_all(total[start : start + piece])
            await left.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await right.dispatch(lambda conn, buffer: got.extend(buffer.take()))
        assert got == total
        assert right.statistics().bytes_received == len(total)
        # After EOF there is nothing to dispatch.
        await right.dispatch(lambda conn, buffer: pytest.fail("called after EOF"))
        assert await right.receive_some() == b""
        await right.aclose()
        assert right.close_reason is CloseReason.PEER_EOF
        await left.aclose()


async def test_what_is_left_is_there_next_time() -> None:
    """What the callback leaves comes again, together with what came since."""
    seen: list[bytes] = []

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        seen.append(buffer.peek())
        if len(buffer) >= 3:
            buffer.discard(2)

    conn, sock = simulated()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, on_message)
        for byte in b"abcde":
            await settled()
            sock.peer_sends(bytes([byte]))
        await settled()
        conn.force_close()
    assert seen == [b"a", b"ab", b"abc", b"cd", b"cde"]


@pytest.mark.parametrize("size", [10, RECEIVE_SIZE, RECEIVE_SIZE + 10])
@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("how", ["stopped", "cancelled"])
async def test_left_over_is_called_for_again(
    make_pair: Callable[..., Awaitable[Pair]], size: int, ended: bool, how: str
) -> None:
    """What was left comes when reading starts or dispatch begins again, with no new input, and
    also when the peer's EOF came meanwhile.
    """
    left, right = await make_pair()
    got = bytearray()
    stopped = False
    returned = trio.Event()

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        nonlocal stopped
        if not stopped:
            if len(buffer) == min(size, RECEIVE_SIZE):
                stopped = True
                scope.cancel() if how == "cancelled" else conn.stop_reading()
        else:
            got.extend(buffer.take())

    async def dispatch() -> None:
        with scope:
            await right.dispatch(on_message)
        if how == "cancelled":
            await resume.wait()
            await right.dispatch(on_message)
        returned.set()

    resume = trio.Event()
    scope = trio.CancelScope()
    left.send(bytes(size))
    await settled(0.01)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dispatch)
        await until(lambda: stopped)
        if ended:
            left.shutdown()
            await settled(0.01)
        assert not got
        resume.set()
        right.start_reading()
        await until(lambda: len(got) == size)
        if ended:
            with trio.fail_after(10):
                await returned.wait()
        nursery.cancel_scope.cancel()
    close(left, right)


async def test_left_over_of_a_cancelled_dispatch() -> None:
    """What a cancelled dispatch had not consumed comes from the next `receive_some`, in order."""
    left, right = await unix_pair()
    left.send(b"hello ")
    with trio.CancelScope() as scope:

        def on_message(conn: TcpConnection, buffer: Buffer) -> None:
            buffer.discard(1)
            scope.cancel()

        await right.dispatch(on_message)
    left.send(b"world")
    await left.send_eof()
    assert await right.receive_some(2) == b"el"
    assert await read_to_end(right) == b"lo world"
    close(left, right)


async def test_stop_reading_inside_the_callback() -> None:
    """No further call comes while reading is stopped, however much waits."""
    conn, sock = simulated()
    calls = 0

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        nonlocal calls
        calls += 1
        buffer.discard(1)
        conn.stop_reading()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, on_message)
        sock.peer_sends(bytes(3 * RECEIVE_SIZE))
        for turn in range(1, 5):
            await settled()
            assert calls == turn
            sock.peer_sends(b"x")
            await settled()
            assert calls == turn
            conn.start_reading()
        conn.force_close()


async def test_start_reading_inside_the_callback_that_stopped() -> None:
    """Stopping and starting in one call is as if nothing had been said: input goes on to come."""
    conn, sock = simulated()
    got = bytearray()

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        conn.stop_reading()
        got.extend(buffer.take())
        conn.start_reading()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, on_message)
        for _ in range(3):
            sock.peer_sends(b"abc")
            await settled()
        conn.force_close()
    assert got == b"abc" * 3


@pytest.mark.parametrize("limit", [1, 1000, RECEIVE_SIZE, RECEIVE_SIZE + 1])
async def test_receive_limit(limit: int) -> None:
    """A callback that consumes nothing is told so when *limit* bytes wait, and never more wait."""
    conn, sock = simulated(watermarks=Watermarks(receive_limit=limit))
    sizes: list[int] = []
    sock.peer_sends(bytes(2 * RECEIVE_SIZE + 10))
    with pytest.raises(ReceiveBufferFull, match=str(limit)):
        await conn.dispatch(lambda conn, buffer: sizes.append(len(buffer)))
    assert sizes[-1] == max(sizes) == limit
    # The rest is still the kernel's.
    assert len(sock.input) == 2 * RECEIVE_SIZE + 10 - limit
    conn.force_close()


@pytest.mark.parametrize("limit", [1000, RECEIVE_SIZE])
async def test_waiting_on_purpose_at_the_limit(limit: int) -> None:
    """A callback that stops reading may leave as much as the limit, and gets it all in the end."""
    conn, sock = simulated(watermarks=Watermarks(receive_limit=limit))
    total = bytes(range(256)) * 1000
    got = bytearray()

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        assert len(buffer) <= limit
        if conn.context:
            got.extend(buffer.take())
        conn.context = not conn.context
        if conn.context:
            conn.stop_reading()

    conn.context = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, on_message)
        sock.peer_sends(total)
        sock.peer_ends()
        for _ in range(2000):
            await settled()
            if len(got) == len(total):
                break
            conn.start_reading()
        assert got == total
        conn.force_close()


async def test_a_callbacks_error() -> None:
    """What the callback raises comes out of dispatch with its traceback; what it sent goes out."""
    left, right = await tcp_pair()

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        conn.send(b"sent ")
        conn.send(b"before")
        raise LookupError("on purpose")

    left.send(b"not consumed")
    with pytest.raises(LookupError, match="on purpose") as caught:
        await right.dispatch(on_message)
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "on_message"
    assert right.close_reason is None
    got = b""
    while len(got) < 11:
        got += await left.receive_some()
    assert got == b"sent before"
    # Nothing that came is lost by it, and the connection goes on.
    assert await right.receive_some() == b"not consumed"
    left.send(b"more")
    assert await right.receive_some() == b"more"
    close(left, right)


@pytest.mark.skipif(not hasattr(signal, "raise_signal"), reason="needs signal.raise_signal")
def test_keyboard_interrupt_in_the_callback() -> None:
    """Ctrl-C while a callback runs comes out of dispatch, in the connection's own task."""
    caught_in: list[str] = []

    async def dispatch(conn: TcpConnection) -> None:
        def on_message(conn: TcpConnection, buffer: Buffer) -> None:
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the callback went on")

        try:
            await conn.dispatch(on_message)
        except KeyboardInterrupt:
            caught_in.append(trio.lowlevel.current_task().name)

    async def main() -> None:
        async with no_leaks():
            left, right = await unix_pair()
            other_left, other = await unix_pair()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(dispatch, right, name="the one")
                left.send(b"x")
            # Nobody else has noticed.
            other_left.send(b"still there")
            assert await other.receive_some() == b"still there"
            close(left, right, other_left, other)

    trio.run(main)
    assert caught_in == ["the one"]


async def test_the_callback_runs_in_the_tasks_context() -> None:
    """Context variables of the task that dispatches are there, and what is set stays set."""
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    left, right = await unix_pair()
    seen: list[int] = []

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        buffer.take()
        seen.append(variable.get())
        variable.set(variable.get() + 1)

    async def dispatch() -> None:
        variable.set(7)
        await right.dispatch(on_message)
        seen.append(variable.get())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dispatch)
        left.send(b"x")
        await until(lambda: len(seen) == 1)
        left.send(b"x")
        await until(lambda: len(seen) == 2)
        left.shutdown()
    assert seen == [7, 8, 9]
    assert variable.get(None) is None
    close(left, right)


async def test_force_close_inside_the_callback() -> None:
    """Dispatch returns, nothing more is called, and nothing that was held is sent."""
    conn, sock = simulated()
    calls = 0

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        nonlocal calls
        calls += 1
        conn.send(b"dropped")
        conn.force_close()
        with pytest.raises(trio.ClosedResourceError):
            conn.send(b"refused")

    sock.peer_sends(bytes(5 * RECEIVE_SIZE))
    await conn.dispatch(on_message)
    await settled()
    assert calls == 1
    assert (bytes(sock.output), sock.closed) == (b"", True)
    assert conn.close_reason is CloseReason.FORCED


@pytest.mark.parametrize("unread", [False, True])
async def test_a_paused_dispatch_hears_of_a_reset(unread: bool) -> None:
    """A dispatch that does not read now is told at once that nothing better will come."""
    left, right = await tcp_pair()
    if not current_poller().always_armed:
        close(left, right)
        pytest.skip("trio's own waits see a reset only when somebody reads")
    async with trio.open_nursery() as nursery:

        async def dispatch() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await right.dispatch(lambda conn, buffer: None)

        right.stop_reading()
        nursery.start_soon(dispatch)
        await settled()
        if unread:
            left.send(b"unread")
            await settled(0.01)
        left.force_close(reset=True)
        with trio.fail_after(10):
            await right.wait_closed()
    assert right.close_reason is CloseReason.PEER_RESET


@pytest.mark.parametrize("mode", ["coroutine", "dispatch"])
@pytest.mark.parametrize("data", [b"", b"with data"])
async def test_fin_that_comes_with_data(
    make_pair: Callable[..., Awaitable[Pair]], mode: str, data: bytes
) -> None:
    """An EOF that comes together with the last bytes, or alone, is not lost."""
    for waiting in (False, True):
        left, right = await make_pair()
        got = bytearray()

        async def receive(right: TcpConnection = right, got: bytearray = got) -> None:
            if mode == "coroutine":
                got += await read_to_end(right)
            else:
                await right.dispatch(lambda conn, buffer: got.extend(buffer.take()))

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                if waiting:
                    nursery.start_soon(receive)
                    await settled()
                left.send(data)
                left.shutdown()
                if not waiting:
                    await settled(0.01)
                    nursery.start_soon(receive)
        assert got == data
        assert right._read.eof
        close(left, right)


# -- which error, after which send


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ECONNRESET])
@pytest.mark.parametrize("unread", [b"", b"from before"])
async def test_reading_after_a_failed_send(number: int, unread: bytes) -> None:
    """What came before is read; then EPIPE leaves the peer's EOF a clean one, a reset does not."""
    conn, sock = simulated()
    sock.peer_sends(unread)
    if number == errno.EPIPE:
        sock.peer_ends()
    await settled()
    if number == errno.EPIPE:
        sock.error = number
    else:
        # The send meets it before the poller does.
        sock.peer_resets()
    with pytest.raises(trio.BrokenResourceError):
        conn.send(b"x")
    assert conn.broken
    if not unread:
        # Nothing is left to be read.
        assert conn.close_reason is CloseReason.PEER_RESET
        with pytest.raises(trio.BrokenResourceError):
            await conn.receive_some()
        return
    assert conn.close_reason is None
    assert await conn.receive_some() == unread
    if number == errno.EPIPE:
        assert await conn.receive_some() == b""
        await conn.aclose()
    else:
        with pytest.raises(trio.BrokenResourceError):
            await conn.receive_some()
    assert conn.close_reason is CloseReason.PEER_RESET


async def test_a_send_of_another_task_meets_the_reset() -> None:
    """A reader that waits is told of a reset that somebody's send met first."""
    left, right = await tcp_pair()
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await right.receive_some()

        nursery.start_soon(receive)
        await settled()
        # Behind the connection's back, so that the poller has not seen it when we send.
        left._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        left.force_close()
        with pytest.raises(trio.BrokenResourceError):
            while True:
                right.send(b"x")
    assert right.close_reason is CloseReason.PEER_RESET


@pytest.mark.parametrize("options", [{}, {"watermarks": Watermarks(receive_limit=None)}])
async def test_a_callback_with_attributes_of_its_own(
    make_pair: MakePair, options: dict[str, Any]
) -> None:
    """Whatever names an object that is a callback has, they mean nothing to us."""

    class Chat:
        room = "lobby"
        at_eof = "bye"

        def __call__(self, conn: TcpConnection, buffer: Buffer) -> None:
            conn.send(buffer.take())

    peer, conn = await make_pair(**options)
    async with peer, conn, trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, Chat())
        peer.send(b"hello")
        assert await peer.receive_some() == b"hello"
        await peer.send_eof()


async def test_a_second_reader_between_a_wake_up_and_its_turn() -> None:
    """Whoever comes second is told so; the first one, or that one, has the input."""
    conn, sock = simulated()
    results: list[object] = []

    async def receive() -> None:
        try:
            results.append(await conn.receive_some())
        except trio.BusyResourceError as error:
            results.append(type(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        # The event itself, for the poller's own turn is one of those that come in any order.
        sock.input += b"one"
        conn._read.channel.readable = True
        conn._read.on_readable()
        nursery.start_soon(receive)
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        sock.peer_sends(b"two")
        await trio.testing.wait_all_tasks_blocked()
        conn.force_close()
    assert sorted(map(str, results)) == sorted(map(str, [b"one", b"two", trio.BusyResourceError]))
