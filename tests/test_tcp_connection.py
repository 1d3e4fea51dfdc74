"""TcpConnection as its users see it: identity, closing in every way, and what peers do to it."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from tests.conftest import (
    Pair,
    fill,
    no_leaks,
    reset,
    tcp_pair,
    tcp_streams,
    unix_pair,
    vanish,
)
from trioreactor import (
    Buffer,
    CloseReason,
    ConnectionState,
    Keepalive,
    SocketOptions,
    TcpConnection,
    Timeouts,
)
from trioreactor.sockets import apply_to_connection

needs_epoll = pytest.mark.skipif(
    os.environ.get("TRIOREACTOR_POLLER") == "trio" or sys.platform != "linux",
    reason="only epoll shows a reset to somebody who does not read",
)


async def read_to_end(stream: trio.abc.ReceiveStream) -> bytes:
    """All that comes until EOF."""
    got = bytearray()
    async for chunk in stream:
        got += chunk
    return bytes(got)


# -- identity


async def test_identity() -> None:
    """Addresses, name, stream and context are there from the start and after the close."""
    left, right = await tcp_streams()
    conn = TcpConnection(left, name="mine")
    other = TcpConnection(right)
    assert conn.name == "mine"
    assert conn.local_address == left.socket.getsockname() == other.peer_address
    assert conn.peer_address == right.socket.getsockname() == other.local_address
    host, port = conn.peer_address[:2]
    assert other.name.startswith(f"{host}:{port}-")
    assert conn.stream is left
    assert conn.socket is left.socket
    conn.context = {"user": 1}
    assert (conn.state, conn.close_reason) == (ConnectionState.CONNECTED, None)
    await conn.aclose()
    await other.aclose()
    assert conn.context == {"user": 1}
    assert conn.peer_address == (host, port)
    assert "mine disconnected" in repr(conn)


async def test_a_peer_that_was_gone_before() -> None:
    """A stream that was reset before it was wrapped can still be wrapped: the first use says so."""
    async with no_leaks():
        left, right = await tcp_streams()
        reset(right.socket)
        conn = TcpConnection(left)
        with pytest.raises(trio.BrokenResourceError):
            await conn.receive_some()
        assert conn.close_reason is CloseReason.PEER_RESET
        await conn.aclose()


async def test_looking_at_the_stream_of_an_accepted_socket() -> None:
    """`from_socket` builds the stream on demand, with the same descriptor."""
    async with no_leaks():
        left, right = socket.socketpair()
        left.setblocking(False)
        conn = TcpConnection.from_socket(left, local_address="", peer_address="")
        assert conn.stream.socket.fileno() == left.fileno()
        assert conn.stream is conn.stream
        conn.send(b"x")
        assert right.recv(10) == b"x"
        await conn.aclose()
        assert left.fileno() == -1
        right.close()


async def test_options_and_info() -> None:
    """set_no_delay, setsockopt, getsockopt and tcp_info reach the socket, if it is a TCP one."""
    left, right = await tcp_pair()
    left.set_no_delay(False)
    assert left.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0
    left.set_no_delay(True)
    assert left.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
    left.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    assert left.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 4) == b"\1\0\0\0"
    if sys.platform == "linux":
        info = left.tcp_info()
        assert info is not None
        assert info.state == 1
        assert info.rtt > 0
        assert 500 < info.send_mss < 70000
    left.force_close()
    right.force_close()
    left, right = await unix_pair()
    left.set_no_delay(True)
    assert left.tcp_info() is None
    left.force_close()
    right.force_close()


# -- closing


async def test_half_close(make_pair: Callable[..., Awaitable[Pair]]) -> None:
    """FAULT 31: after the peer's EOF we can still send, and after ours still receive."""
    async with no_leaks():
        left, right = await make_pair()
        await left.send_all(b"question")
        await left.send_eof()
        assert left.state is ConnectionState.DISCONNECTING
        assert await read_to_end(right) == b"question"
        assert right.state is ConnectionState.CONNECTED
        await right.send_all(b"answer")
        await right.aclose()
        assert right.close_reason is CloseReason.PEER_EOF
        assert await read_to_end(left) == b"answer"
        await left.aclose()
        assert left.close_reason is CloseReason.PEER_EOF


async def test_shutdown_sends_what_is_queued(make_pair: Callable[..., Awaitable[Pair]]) -> None:
    """`shutdown` is behind everything queued, refuses more, and is idempotent."""
    left, right = await make_pair()
    size = await fill(left)
    left.shutdown()
    left.shutdown()
    with pytest.raises(trio.ClosedResourceError):
        left.send(b"more")
    assert len(await read_to_end(right)) == size
    await right.aclose()
    assert await left.receive_some() == b""
    await left.aclose()


async def test_shutdown_does_not_wait_for_ever(
    mock_clock: trio.testing.MockClock, make_pair: Callable[..., Awaitable[Pair]]
) -> None:
    """FAULT 32: a peer that never closes has `linger` seconds, then the descriptor is closed."""
    async with no_leaks():
        left, right = await make_pair(timeouts=Timeouts(linger=3))
        left.shutdown()
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(2.9)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert left.state is ConnectionState.DISCONNECTING
        mock_clock.jump(0.2)
        await left.wait_closed()
        assert left.close_reason is CloseReason.LOCAL_CLOSE
        await left.aclose()
        await right.aclose()


async def test_send_eof_has_no_deadline(
    mock_clock: trio.testing.MockClock, make_pair: Callable[..., Awaitable[Pair]]
) -> None:
    """Its caller reads the answer on his own terms, however long the peer takes."""
    left, right = await make_pair(timeouts=Timeouts(linger=3))
    await left.send_eof()
    mock_clock.jump(1000)
    await trio.testing.wait_all_tasks_blocked(0.01)
    right.send(b"late")
    assert await left.receive_some() == b"late"
    left.force_close()
    right.force_close()


async def test_aclose_flushes(make_pair: Callable[..., Awaitable[Pair]]) -> None:
    """Promise B: everything queued arrives, then a clean EOF."""
    async with no_leaks():
        left, right = await make_pair()
        size = await fill(left, 300_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(left.aclose)
            assert len(await read_to_end(right)) == size
        assert left.close_reason is CloseReason.LOCAL_CLOSE
        await right.aclose()


async def test_aclose_gives_up_on_a_peer_that_takes_nothing(
    mock_clock: trio.testing.MockClock, make_pair: Callable[..., Awaitable[Pair]]
) -> None:
    """Promise D: flushing ends after `linger` seconds without headway; the reason says why."""
    async with no_leaks():
        left, right = await make_pair(timeouts=Timeouts(linger=2))
        await fill(left)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(left.aclose)
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(1.9)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert left.state is ConnectionState.DISCONNECTING
            mock_clock.jump(0.2)
        assert left.close_reason is CloseReason.WRITE_STALLED
        await right.aclose()


async def test_unread_input_does_not_cost_our_last_bytes() -> None:
    """FAULT 33: closing with input unread sends no reset while our bytes are on their way."""
    async with no_leaks():
        left, right = await tcp_streams()
        conn = TcpConnection(left)
        async with trio.open_nursery() as nursery:

            async def talker() -> None:
                # More than the kernel takes at once: more input comes while we close.
                with contextlib.suppress(trio.BrokenResourceError):
                    await right.send_all(bytes(5_000_000))
                await right.send_eof()

            nursery.start_soon(talker)
            await trio.testing.wait_all_tasks_blocked()
            conn.send(b"last words")
            async with trio.open_nursery() as inner:
                inner.start_soon(conn.aclose)
                got = await read_to_end(right)
            nursery.cancel_scope.cancel()
        assert got == b"last words"
        await right.aclose()


async def test_linger_ends_with_a_peer_that_talks_on(mock_clock: trio.testing.MockClock) -> None:
    """Promise D: unread input makes closing wait for the peer's EOF, for at most `linger`."""
    async with no_leaks():
        left, right = await tcp_pair(timeouts=Timeouts(linger=2))
        right.send(b"unread")
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(left.aclose)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(19):
                right.send(b"and on")
                mock_clock.jump(0.1)
                await trio.testing.wait_all_tasks_blocked(0.001)
            assert left.state is ConnectionState.DISCONNECTING
            mock_clock.jump(0.2)
        assert left.close_reason is CloseReason.LOCAL_CLOSE
        right.force_close()


async def test_aclose_wakes_everyone(make_pair: Callable[..., Awaitable[Pair]]) -> None:
    """Whoever is blocked hears of a graceful close at once, before the flush is over."""
    left, right = await make_pair()
    size = await fill(left)
    woken: list[str] = []

    async def expect(what: str, call: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await call()
        woken.append(what)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, "send", lambda: left.send_all(b"x"))
        nursery.start_soon(expect, "receive", left.receive_some)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(left.aclose)
        nursery.start_soon(left.aclose)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(woken) == ["receive", "send"]
        assert left.state is ConnectionState.DISCONNECTING
        assert len(await read_to_end(right)) == size + 1
    await right.aclose()


async def test_force_close_wakes_everyone(make_pair: Callable[..., Awaitable[Pair]]) -> None:
    """FAULT 34: at once and twice, while sending, receiving, draining and waiting for the end."""
    async with no_leaks():
        left, right = await make_pair()
        await fill(left)
        ended: list[str] = []

        async def expect_closed(what: str, call: Callable[[], Awaitable[object]]) -> None:
            with pytest.raises(trio.ClosedResourceError):
                await call()
            ended.append(what)

        async def wait_closed() -> None:
            await left.wait_closed()
            ended.append("wait_closed")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_closed, "send_all", lambda: left.send_all(b"x"))
            nursery.start_soon(expect_closed, "receive_some", left.receive_some)
            nursery.start_soon(expect_closed, "wait_drained", left.wait_drained)
            nursery.start_soon(wait_closed)
            await trio.testing.wait_all_tasks_blocked()
            left.force_close()
            left.force_close(CloseReason.IDLE_TIMEOUT)
            assert left.state is ConnectionState.DISCONNECTED
        assert len(ended) == 4
        assert left.close_reason is CloseReason.FORCED
        assert left.statistics().buffered == 0
        for call in (left.send_all, left.send):
            with pytest.raises(trio.ClosedResourceError):
                result = call(b"x")
                if result is not None:
                    await result  # type: ignore[misc]
        await left.aclose()
        right.force_close()


async def test_force_close_from_its_own_callbacks(
    make_pair: Callable[..., Awaitable[Pair]],
) -> None:
    """FAULT 34: in on_message with sends before and input after it, and in each other callback."""
    async with no_leaks():
        for where in ("message", "high", "low", "complete"):
            left, right = await make_pair()
            calls: list[str] = []

            def close(conn: TcpConnection, *_: object, calls: list[str] = calls) -> None:
                calls.append("closed")
                conn.send(b"before")
                conn.force_close()
                with pytest.raises(trio.ClosedResourceError):
                    conn.send(b"after")

            def message(conn: TcpConnection, buffer: Buffer, where: str = where) -> None:
                buffer.take()
                if where == "message":
                    close(conn)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(left.dispatch, message)
                await trio.testing.wait_all_tasks_blocked()
                if where == "message":
                    right.send(b"go")
                    right.send(b"on")
                elif where == "complete":
                    left.write_complete_callback = close
                    left.send(b"x")
                else:
                    if where == "high":
                        left.high_water_mark_callback = close
                    else:
                        left.low_water_mark_callback = close
                    await fill(left)
                    with contextlib.suppress(trio.BrokenResourceError):
                        while await right.receive_some():
                            pass
            assert calls == ["closed"]
            assert left.close_reason is CloseReason.FORCED
            right.force_close()
            await left.aclose()
            await right.aclose()


async def test_force_close_with_reset() -> None:
    """The peer gets RST, not FIN."""
    left, right = await tcp_pair()
    left.force_close(reset=True)
    with pytest.raises(trio.BrokenResourceError):
        await right.receive_some()
    assert right.close_reason is CloseReason.PEER_RESET


async def test_force_close_after(mock_clock: trio.testing.MockClock) -> None:
    """It comes at its time; a later call replaces it; a close before it cancels it."""
    async with no_leaks():
        left, right = await tcp_pair()
        left.force_close_after(1)
        left.force_close_after(5)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(4.9)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert left.state is ConnectionState.CONNECTED
        mock_clock.jump(0.2)
        await left.wait_closed()
        assert left.close_reason is CloseReason.FORCED
        right.force_close_after(1)
        await right.aclose()
        right.force_close_after(1)
        mock_clock.jump(2)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert right.close_reason is CloseReason.LOCAL_CLOSE
        with pytest.raises(ValueError, match="at least 0 seconds"):
            right.force_close_after(-1)


async def test_detach() -> None:
    """The stream comes back open, with what was read and not consumed; queued data forbids it."""
    async with no_leaks():
        left, right = await tcp_streams()
        conn = TcpConnection(left)
        seen = trio.Event()

        def message(conn: TcpConnection, buffer: Buffer) -> None:
            if len(buffer) >= 5:
                buffer.take(3)
                seen.set()
                conn.stop_reading()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(conn.dispatch, message)
            await right.send_all(b"hello")
            await seen.wait()
            with pytest.raises(trio.BusyResourceError):
                conn.detach()
            nursery.cancel_scope.cancel()
        await fill(conn)
        with pytest.raises(trio.BusyResourceError, match="queued"):
            conn.detach()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(conn.wait_drained)
            while conn.statistics().buffered:
                await right.receive_some()
        stream, left_over = conn.detach()
        assert (stream, left_over) == (left, b"lo")
        assert conn.state is ConnectionState.DISCONNECTED
        await right.send_all(b"more")
        assert await stream.receive_some() == b"more"
        await conn.aclose()
        await stream.send_all(b"!")
        await stream.aclose()
        await right.aclose()


async def test_the_handler_scope_is_cancelled() -> None:
    """`force_close` ends whatever the connection's handler is at, once."""
    left, right = await tcp_pair()
    with trio.CancelScope() as left.handler_scope:
        left.force_close()
        await trio.sleep_forever()
    assert left.handler_scope is not None
    assert left.handler_scope.cancelled_caught
    right.force_close()


# -- what peers and the network do


async def test_reset_while_sending_and_receiving() -> None:
    """FAULT 29: one close, and everyone who waits is woken with BrokenResourceError."""
    async with no_leaks():
        left, right = await tcp_streams()
        conn = TcpConnection(left)
        await fill(conn)
        woken = 0

        async def expect_broken(call: Callable[[], Awaitable[object]]) -> None:
            nonlocal woken
            with pytest.raises(trio.BrokenResourceError):
                await call()
            woken += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_broken, lambda: conn.send_all(b"x"))
            nursery.start_soon(expect_broken, conn.receive_some)
            nursery.start_soon(expect_broken, conn.wait_drained)
            await trio.testing.wait_all_tasks_blocked()
            reset(right.socket)
        assert woken == 3
        assert conn.broken
        assert conn.close_reason is CloseReason.PEER_RESET
        with pytest.raises(trio.BrokenResourceError):
            conn.send(b"x")
        await conn.aclose()
        with pytest.raises(trio.ClosedResourceError):
            conn.send(b"x")


async def test_what_came_before_a_reset_can_be_read() -> None:
    """A send that meets the reset does not cost the input that the kernel already has."""
    async with no_leaks():
        left, right = await tcp_streams()
        conn = TcpConnection(left)
        await right.send_all(b"last words")
        reset(right.socket)
        with pytest.raises(trio.BrokenResourceError):
            while True:
                conn.send(b"x")
        assert await conn.receive_some() == b"last words"
        with pytest.raises(trio.BrokenResourceError):
            await conn.receive_some()
        assert conn.close_reason is CloseReason.PEER_RESET
        await conn.aclose()


async def test_a_reset_never_looks_like_a_clean_end() -> None:
    """Promise B: after a send took the kernel's error, reading still ends in an error, not EOF."""
    for dispatching in (False, True):
        left, right = await tcp_streams()
        conn = TcpConnection(left)
        conn.stop_reading()
        reset(right.socket)
        with pytest.raises(trio.BrokenResourceError):
            while True:
                conn.send(b"x")
        conn.start_reading()
        with pytest.raises(trio.BrokenResourceError):
            if dispatching:
                await conn.dispatch(lambda conn, buffer: None)
                # At its start it may be closed already.
            else:
                await conn.receive_some()
        await conn.aclose()


@needs_epoll
async def test_a_reset_is_seen_by_somebody_who_does_not_read() -> None:
    """Pausing a read is just not reading: the connection ends, with its descriptor."""
    async with no_leaks():
        left, right = await tcp_streams()
        conn = TcpConnection(left)
        conn.stop_reading()
        reset(right.socket)
        with trio.fail_after(5):
            await conn.wait_closed()
        assert conn.close_reason is CloseReason.PEER_RESET
        await conn.aclose()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs TCP_REPAIR")
async def test_a_peer_that_vanished() -> None:
    """FAULT 35: neither FIN nor RST: the user timeout ends it while data is unacknowledged."""
    async with no_leaks():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            server, peer = listener.accept()
        server.setblocking(False)
        options = SocketOptions(user_timeout=0.5, keepalive=Keepalive(idle=1, interval=1, count=1))
        apply_to_connection(server, options)
        conn = TcpConnection.from_socket(
            server, local_address=server.getsockname(), peer_address=peer
        )
        vanish(client)
        conn.send(b"anybody there?")
        with trio.fail_after(20), pytest.raises(trio.BrokenResourceError):
            await conn.receive_some()
        assert conn.close_reason is CloseReason.PEER_RESET
        await conn.aclose()


async def test_a_write_that_stalls(mock_clock: trio.testing.MockClock) -> None:
    """FAULT 30: a zero window for ever ends at `write_stall`; a little progress puts it off."""
    async with no_leaks():
        left, right = await unix_pair(timeouts=Timeouts(write_stall=10))
        # More than the little progress below takes away.
        left.send(bytes(10_000_000))
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(9)
        await trio.testing.wait_all_tasks_blocked(0.01)
        sent = left.statistics().bytes_sent
        while left.statistics().bytes_sent == sent:
            await right.receive_some()
            await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(9)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert left.state is ConnectionState.CONNECTED
        mock_clock.jump(1.1)
        await left.wait_closed()
        assert left.close_reason is CloseReason.WRITE_STALLED
        await left.aclose()
        await right.aclose()
