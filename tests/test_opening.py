"""Opening: what comes before a connection is its handler's is done in time, or ends it alone."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.conftest import no_leaks
from trioreactor import (
    Buffer,
    Callbacks,
    CloseReason,
    ConnectionState,
    IllegalStateTransition,
    ProtocolError,
    TcpConnection,
    Timeouts,
    Watermarks,
)
from trioreactor.broadcaster import Broadcaster
from trioreactor.connection_callbacks import Handler
from trioreactor.limits import ConnectionLimiter
from trioreactor.opening import Opening, in_order
from trioreactor.options import Limits
from trioreactor.server_connections import ServerConnections, Service


def echo(conn: TcpConnection, buffer: Buffer) -> None:
    """Send back what has come."""
    conn.send(buffer.take())


async def echo_handler(conn: TcpConnection) -> None:
    """The same."""
    async for chunk in conn:
        await conn.send_all(chunk)


either_mode = pytest.mark.parametrize(
    "handler", [echo_handler, Callbacks(message=echo)], ids=["coroutine", "dispatch"]
)


@asynccontextmanager
async def opening_by(
    *steps: Opening, handler: Handler = echo_handler, handshake: float | None = 10.0
) -> AsyncIterator[tuple[trio.SocketStream, TcpConnection]]:
    """A peer, and its connection, which is being opened, among those of a server."""
    async with no_leaks():
        theirs, ours = socket.socketpair()
        ours.setblocking(False)
        limiter = ConnectionLimiter(Limits(connections=1))
        assert limiter.try_acquire() is None
        assert limiter.try_enter("")
        service = Service(
            handler=handler,
            opening=in_order(steps),
            broadcaster=Broadcaster("test", "close", None),
            watermarks=Watermarks(),
            timeouts=Timeouts(),
            behind_proxy=False,
        )
        conns = ServerConnections(service, limiter.leave)
        async with trio.open_nursery() as nursery:
            await conns.serve_in(nursery, own=True)
            conn = TcpConnection.from_socket(
                ours,
                local_address="",
                peer_address="",
                name="server-peer#1",
                timeouts=Timeouts(handshake=handshake, idle=0.1),
                state=ConnectionState.CONNECTING,
            )
            conns.enter(conn)
            peer = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
            try:
                yield peer, conn
            finally:
                peer.socket.close()
                conns.stop_entering()
        assert not conns.by_name
        totals = conns.totals()
        assert (totals.opened, sum(totals.closed.values())) == (1, 1)
        # The permit is free again.
        assert limiter.try_acquire() is None


async def password(conn: TcpConnection) -> None:
    """A handshake: four bytes, answered, and not one more is read."""
    got = b""
    while len(got) < 4:
        got += await conn.receive_some(4 - len(got))
        if conn.at_eof:
            raise ProtocolError("the peer went")
    if got != b"open":
        raise ProtocolError(f"{got!r} opens nothing")
    conn.send_opening(b"welcome ")


@either_mode
async def test_what_follows_a_handshake_is_the_handlers(handler: Handler) -> None:
    """B: not one byte is lost between the two, in either mode, however it comes."""
    async with opening_by(password, handler=handler) as (peer, conn):
        assert conn.state is ConnectionState.CONNECTING
        await peer.send_all(b"open sesame")
        got = b""
        while len(got) < 15:
            got += await peer.receive_some()
        assert got == b"welcome  sesame"
        assert conn.state is ConnectionState.CONNECTED
    assert conn.close_reason is CloseReason.PEER_EOF


async def test_steps_come_in_order() -> None:
    """One begins where the one before it has ended."""
    async with opening_by(password, password) as (peer, _conn):
        await peer.send_all(b"openopen!")
        got = b""
        while len(got) < 17:
            got += await peer.receive_some()
        assert got == b"welcome welcome !"


async def test_nothing_is_sent_before() -> None:
    """Until it is open, nobody's bytes come between those of the handshake."""
    async with opening_by(password) as (peer, conn):
        with pytest.raises(trio.BusyResourceError, match="handshake"):
            conn.send(b"news")
        assert conn.send_if_idle(b"news") is False
        await peer.send_all(b"open")
        assert await peer.receive_some() == b"welcome "
        assert conn.send_if_idle(b"news") is True
        with pytest.raises(RuntimeError, match="open already"):
            conn.send_opening(b"too late")
        with pytest.raises(IllegalStateTransition):
            conn.opened()


@either_mode
async def test_a_refusal(handler: Handler, caplog: pytest.LogCaptureFixture) -> None:
    """What a handshake refuses ends that connection, with a line that says why."""
    async with opening_by(password, handler=handler) as (peer, conn):
        await peer.send_all(b"shut")
        assert await peer.receive_some() == b""
    assert conn.close_reason is CloseReason.HANDSHAKE_FAILED
    (record,) = (r for r in caplog.records if r.levelno >= logging.INFO)
    assert record.getMessage() == "server-peer#1: b'shut' opens nothing"
    with pytest.raises(trio.ClosedResourceError):
        conn.send_opening(b"anybody there?")


async def test_a_mistake_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    """A handshake that fails by a bug ends its connection only, with a traceback."""

    async def mistaken(conn: TcpConnection) -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    async with opening_by(mistaken) as (peer, conn):
        assert await peer.receive_some() == b""
    assert conn.close_reason is CloseReason.HANDSHAKE_FAILED
    (record,) = (r for r in caplog.records if r.levelno >= logging.INFO)
    assert record.exc_info is not None


@either_mode
async def test_a_handshake_that_stalls(
    handler: Handler, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """D: it has its deadline; the connection's own do not run before it is open."""
    async with opening_by(password, handler=handler) as (peer, conn):
        await peer.send_all(b"ope")
        assert await peer.receive_some() == b""
        assert trio.current_time() == pytest.approx(10)
    assert conn.close_reason is CloseReason.HANDSHAKE_FAILED
    assert "not done within 10 s" in caplog.text


async def test_deadlines_run_from_the_opening(autojump_clock: MockClock) -> None:
    """D: a connection that is open has its own."""
    async with opening_by(password, handshake=None) as (peer, conn):
        await trio.sleep(100)
        assert conn.state is ConnectionState.CONNECTING
        await peer.send_all(b"open")
        assert await peer.receive_some() == b"welcome "
        assert await peer.receive_some() == b""
    assert conn.close_reason is CloseReason.IDLE_TIMEOUT


@either_mode
async def test_closed_before_it_is_open(handler: Handler) -> None:
    """C: a close from outside is the only one, and the handshake ends."""
    async with opening_by(password, handler=handler) as (peer, conn):
        await trio.testing.wait_all_tasks_blocked()
        conn.force_close(CloseReason.DRAIN_TIMEOUT)
        assert await peer.receive_some() == b""
    assert conn.close_reason is CloseReason.DRAIN_TIMEOUT


async def test_cancelled_before_it_is_open() -> None:
    """F, C: a server that is cancelled closes what is being opened."""
    with trio.CancelScope() as scope:
        async with opening_by(password) as (_, conn):
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert conn.close_reason is CloseReason.CANCELLED


async def test_a_peer_that_goes_before_it_is_open(caplog: pytest.LogCaptureFixture) -> None:
    """A reset is the peer's doing, and no warning."""
    async with opening_by(password) as (peer, conn):
        await trio.testing.wait_all_tasks_blocked()
        # A close with unread input is a reset, on Unix sockets, too.
        conn.send_opening(b"unread")
        peer.socket.close()
        await trio.testing.wait_all_tasks_blocked()
    assert conn.close_reason in {CloseReason.PEER_RESET, CloseReason.HANDSHAKE_FAILED}
    assert not [r for r in caplog.records if r.levelno > logging.WARNING]


@either_mode
async def test_a_peer_that_only_connects(
    handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    """A health check or a port scan is no warning; but half a handshake is."""
    async with opening_by(password, handler=handler) as (peer, conn):
        await peer.send_eof()
        assert await peer.receive_some() == b""
    assert conn.close_reason is CloseReason.PEER_EOF
    assert not [r for r in caplog.records if r.levelno >= logging.INFO]
    async with opening_by(password, handler=handler) as (peer, conn):
        await peer.send_all(b"op")
        await peer.send_eof()
        assert await peer.receive_some() == b""
    assert conn.close_reason is CloseReason.HANDSHAKE_FAILED
    assert "the peer went" in caplog.text
