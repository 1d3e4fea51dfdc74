"""Callbacks: a handler made of functions. Up and down come in pairs; errors stay where they are."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import pytest
import trio

from tests.conftest import connect, no_leaks, serving, tcp_pair, until
from trioreactor import (
    Buffer,
    Callbacks,
    CloseReason,
    ConnectionState,
    LineCodec,
    ProtocolError,
    TcpConnection,
    TcpServer,
    Timeouts,
    Watermarks,
)

CONNECTED, DISCONNECTED = ConnectionState.CONNECTED, ConnectionState.DISCONNECTED

# Small, so that little is needed to cross them.
MARKS = Watermarks(high=1000, low=100)


def echo(conn: TcpConnection, buffer: Buffer) -> None:
    """Send back what came."""
    conn.send(buffer.take())


class Log:
    """A connection callback that notes what it sees of each connection."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[ConnectionState, CloseReason | None]]] = {}

    def __call__(self, conn: TcpConnection) -> None:
        self.seen.setdefault(conn.name, []).append((conn.state, conn.close_reason))

    def ups(self) -> int:
        """How many connections have come up."""
        return sum(calls[0] == (CONNECTED, None) for calls in self.seen.values())

    def downs(self) -> list[CloseReason | None]:
        """The reasons of those that are down."""
        for calls in self.seen.values():
            assert len(calls) <= 2
            assert calls[0] == (CONNECTED, None)
        return [calls[1][1] for calls in self.seen.values() if len(calls) == 2]


async def said(client: trio.SocketStream, data: bytes) -> bytes:
    """What an echo server says to *data*."""
    await client.send_all(data)
    answer = b""
    while len(answer) < len(data):
        chunk = await client.receive_some()
        assert chunk
        answer += chunk
    return answer


def complaints(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the library has logged as an error."""
    return [
        r
        for r in caplog.records
        if r.name.startswith("trioreactor") and r.levelno >= logging.WARNING
    ]


# -- up and down


async def test_up_and_down() -> None:
    """Each connection comes up once, CONNECTED, and goes down once, with the reason known."""
    log = Log()
    server = TcpServer(Callbacks(message=echo, connection=log), 0, host="127.0.0.1")
    async with no_leaks():
        async with serving(server) as address:
            for turn in range(3):
                async with connect(address) as client:
                    assert await said(client, b"hello") == b"hello"
                    assert log.ups() == turn + 1
                await until(lambda turn=turn: len(log.downs()) == turn + 1)
        assert log.downs() == [CloseReason.PEER_EOF] * 3
        assert dict(server.statistics().closed) == {CloseReason.PEER_EOF: 3}


async def test_down_however_it_ends() -> None:
    """A connection goes down also when we close it, force it, or cancel everything."""
    for end, reason in (
        ("server.close", CloseReason.FORCED),
        ("conn.force_close", CloseReason.FORCED),
        ("conn.shutdown", CloseReason.PEER_EOF),
        ("cancel", CloseReason.CANCELLED),
    ):
        log = Log()
        server = TcpServer(Callbacks(message=echo, connection=log), 0, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            (acceptor,) = await nursery.start(server.serve)
            async with connect(acceptor.address) as client:
                assert await said(client, b"hello") == b"hello"
                (conn,) = server.connections.values()
                if end == "server.close":
                    server.close()
                elif end == "cancel":
                    nursery.cancel_scope.cancel()
                else:
                    getattr(conn, end.removeprefix("conn."))()
                if end == "conn.shutdown":
                    assert await client.receive_some() == b""
            with trio.CancelScope(shield=True):
                await until(log.downs)
            server.close()
        assert log.downs() == [reason], end


async def test_up_before_any_message() -> None:
    """Input that came with the connection is handed out after the connection is up."""
    order: list[str] = []

    def message(conn: TcpConnection, buffer: Buffer) -> None:
        order.append("message")
        echo(conn, buffer)

    callbacks = Callbacks(message=message, connection=lambda conn: order.append(conn.state.name))
    async with serving(TcpServer(callbacks, 0, host="127.0.0.1")) as address:
        async with connect(address) as client:
            assert await said(client, b"early") == b"early"
        await until(lambda: len(order) == 3)
    assert order == ["CONNECTED", "message", "DISCONNECTED"]


async def test_sending_when_up() -> None:
    """The connection callback may greet; the greeting comes before any answer."""

    def greet(conn: TcpConnection) -> None:
        if conn.state is CONNECTED:
            conn.send(b"welcome")

    server = TcpServer(Callbacks(message=echo, connection=greet), 0, host="127.0.0.1")
    async with serving(server) as address, connect(address) as client:
        assert await client.receive_some() == b"welcome"
        assert await said(client, b"hello") == b"hello"


async def test_turned_away_when_up() -> None:
    """A connection callback that closes its connection has it go down, and nothing is logged."""
    log = Log()
    messages: list[bytes] = []

    def turn_away(conn: TcpConnection) -> None:
        log(conn)
        conn.force_close()

    callbacks = Callbacks(message=lambda _, b: messages.append(b.take()), connection=turn_away)
    server = TcpServer(callbacks, 0, host="127.0.0.1")
    async with serving(server) as address, connect(address) as client:
        await client.send_all(b"let me in")
        await until(log.downs)
    assert log.downs() == [CloseReason.FORCED]
    assert not messages


async def test_all_that_is_sent_arrives() -> None:
    """What is queued when the peer half-closes is flushed before the connection goes down."""
    sent = 0

    def message(conn: TcpConnection, buffer: Buffer) -> None:
        nonlocal sent
        buffer.take()
        while conn.send(bytes(65536)):
            sent += 65536
        sent += 65536

    server = TcpServer(
        Callbacks(message=message), 0, host="127.0.0.1", timeouts=Timeouts(linger=20)
    )
    async with serving(server) as address, connect(address) as client:
        await client.send_all(b"everything, please")
        await client.send_eof()
        received = 0
        while chunk := await client.receive_some():
            received += len(chunk)
    assert received == sent > 0
    assert dict(server.statistics().closed) == {CloseReason.PEER_EOF: 1}


async def test_write_side_callbacks() -> None:
    """High mark, low mark and write-complete are called with the connection, in that order."""
    calls: list[tuple[str, bool]] = []

    def flood(conn: TcpConnection, buffer: Buffer) -> None:
        buffer.take()
        while conn.send(bytes(65536)):
            pass

    callbacks = Callbacks(
        message=flood,
        high_water_mark=lambda conn, size: calls.append(("high", size > MARKS.high)),
        low_water_mark=lambda conn, size: calls.append(("low", size <= MARKS.low)),
        write_complete=lambda conn: calls.append(("complete", isinstance(conn, TcpConnection))),
    )
    server = TcpServer(callbacks, 0, host="127.0.0.1", watermarks=MARKS)
    async with serving(server) as address, connect(address) as client:
        await client.send_all(b"flood me")
        await until(lambda: "high" in dict(calls))
        with trio.fail_after(20):
            while "complete" not in dict(calls[1:]):
                await client.receive_some()
    # Filling the kernel first completes a few writes.
    rest = calls[calls.index(("high", True)) :]
    assert rest == [("high", True), ("low", True), ("complete", True)]


# -- errors


def fail(*_: object) -> None:
    """A callback that raises."""
    raise ValueError("on purpose")


def fail_when(state: ConnectionState, log: Log) -> Any:
    """A connection callback that raises in one of its two calls."""

    def connection(conn: TcpConnection) -> None:
        log(conn)
        if conn.state is state:
            fail()

    return connection


def flood_or_echo(conn: TcpConnection, buffer: Buffer) -> None:
    """Send much for "flood", and else what came."""
    if buffer.peek() == b"flood":
        buffer.take()
        while conn.send(bytes(65536)):
            pass
    else:
        echo(conn, buffer)


@pytest.mark.parametrize(
    "failing",
    ["message", "up", "down", "write_complete", "high_water_mark", "low_water_mark"],
)
async def test_an_error_ends_its_own_connection(
    failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever callback raises, that connection ends with HANDLER_ERROR, which is logged once.

    The server and the other connections go on.
    """
    log = Log()
    good = Callbacks(message=echo)
    functions: dict[str, Any] = {"message": flood_or_echo, "connection": log}
    if failing in ("up", "down"):
        functions["connection"] = fail_when(CONNECTED if failing == "up" else DISCONNECTED, log)
    else:
        functions[failing] = fail
    bad = Callbacks(**functions)
    victims: list[TcpConnection] = []

    async def handler(conn: TcpConnection) -> None:
        # The first connection is the witness.
        if len(server.connections) == 1:
            await good(conn)
        else:
            victims.append(conn)
            await bad(conn)

    server = TcpServer(handler, 0, host="127.0.0.1", watermarks=MARKS)
    async with no_leaks(), serving(server) as address, connect(address) as witness:
        assert await said(witness, b"before") == b"before"
        async with connect(address) as client:
            if failing != "up":
                await client.send_all(b"flood")
            if failing == "down":
                await client.send_eof()
            if failing in ("down", "low_water_mark"):
                # Closed in the middle or at the end, but closed.
                with trio.fail_after(20), suppress(trio.BrokenResourceError):
                    while await client.receive_some():
                        pass
            await until(log.downs)
        await until(lambda: len(server.connections) == 1)
        (victim,) = victims
        assert await said(witness, b"after") == b"after"
        # What has an end already keeps its reason.
        reason = CloseReason.PEER_EOF if failing == "down" else CloseReason.HANDLER_ERROR
        assert victim.close_reason is reason
        assert log.downs() == [reason]
        assert dict(server.statistics().closed) == {reason: 1}
    (record,) = complaints(caplog)
    assert record.name == "trioreactor.server"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)
    assert victim.name in record.getMessage()


async def test_the_first_error_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    """When the down call raises because a message had, the log shows both errors, once."""

    def message(conn: TcpConnection, buffer: Buffer) -> None:
        raise KeyError("the first")

    log = Log()
    callbacks = Callbacks(message=message, connection=fail_when(DISCONNECTED, log))
    server = TcpServer(callbacks, 0, host="127.0.0.1")
    async with serving(server) as address, connect(address) as client:
        await client.send_all(b"x")
        await until(log.downs)
        await until(lambda: not server.connections)
    (record,) = complaints(caplog)
    assert record.exc_info is not None
    error = record.exc_info[1]
    assert isinstance(error, ValueError)
    assert isinstance(error.__context__, KeyError)
    assert log.downs() == [CloseReason.HANDLER_ERROR]


@pytest.mark.parametrize("error", [trio.ClosedResourceError, trio.BrokenResourceError])
async def test_an_error_of_something_else(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """An error of a file or connection that a callback uses is not taken for the end of ours."""

    def message(conn: TcpConnection, buffer: Buffer) -> None:
        raise error("the database is gone")

    log = Log()
    server = TcpServer(Callbacks(message=message, connection=log), 0, host="127.0.0.1")
    async with serving(server) as address, connect(address) as client:
        await client.send_all(b"x")
        await until(log.downs)
        await until(lambda: not server.connections)
    assert log.downs() == [CloseReason.HANDLER_ERROR]
    (record,) = complaints(caplog)
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], error)


async def test_a_protocol_error(caplog: pytest.LogCaptureFixture) -> None:
    """What the peer did wrong is PROTOCOL_ERROR, one warning without a traceback."""

    def message(conn: TcpConnection, buffer: Buffer) -> None:
        raise ProtocolError("no such command")

    log = Log()
    server = TcpServer(Callbacks(message=message, connection=log), 0, host="127.0.0.1")
    async with serving(server) as address, connect(address) as client:
        await client.send_all(b"x")
        await until(log.downs)
    assert log.downs() == [CloseReason.PROTOCOL_ERROR]
    (record,) = complaints(caplog)
    assert record.levelno == logging.WARNING
    assert "no such command" in record.getMessage()
    assert record.exc_info is None


@pytest.mark.parametrize("failing", ["message", "write_complete"])
async def test_an_error_outside_a_server(failing: str, caplog: pytest.LogCaptureFixture) -> None:
    """Called on a connection of one's own, it raises what the callback raised, and has closed.

    Nothing is logged: the error is the caller's.
    """
    log = Log()
    functions: dict[str, Any] = {"message": echo, failing: fail}
    left, right = await tcp_pair()
    async with left, right:
        await right.send_all(b"x")
        with trio.fail_after(20), pytest.raises(ValueError, match="on purpose"):
            await Callbacks(**functions, connection=log)(left)
        assert left.close_reason is CloseReason.HANDLER_ERROR
        assert log.downs() == [CloseReason.HANDLER_ERROR]
    assert not complaints(caplog)


async def test_cancelling_it_outside_a_server() -> None:
    """Cancelled, it closes the connection, and the connection goes down as CANCELLED."""
    log = Log()
    left, right = await tcp_pair()
    async with left, right:
        with trio.move_on_after(0.01) as scope:
            await Callbacks(message=echo, connection=log)(left)
        assert scope.cancelled_caught
        assert log.downs() == [CloseReason.CANCELLED]


def test_what_is_no_function() -> None:
    """It is refused where it is written; of a codec the text says how to make a callback of it."""
    with pytest.raises(TypeError, match=r"Callbacks\(message=.*\): pass a function") as caught:
        Callbacks(message=LineCodec())  # type: ignore[arg-type]
    assert "codec.on_message(" in str(caught.value)
    fields = ("connection", "write_complete", "high_water_mark", "low_water_mark", "draining")
    for name in ("message", *fields):
        with pytest.raises(TypeError, match=rf"Callbacks\({name}=5\): pass a function$"):
            Callbacks(**{"message": echo} | {name: 5})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Callbacks\(message=None\): pass a function"):
        Callbacks(message=None)  # type: ignore[arg-type]
    Callbacks(message=LineCodec().on_message(print), **dict.fromkeys(fields))


def test_it_is_a_value() -> None:
    """Its fields are keywords and fixed; only the message callback is needed."""
    callbacks = Callbacks(message=echo)
    assert callbacks == Callbacks(message=echo)
    assert callbacks.connection is callbacks.write_complete is None
    assert callbacks.high_water_mark is callbacks.low_water_mark is None
    with pytest.raises(AttributeError):
        callbacks.message = fail  # type: ignore[misc]
    with pytest.raises(TypeError):
        Callbacks()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Callbacks(echo)  # type: ignore[misc]
