"""Errors of a handler: what they mean for its connection, and how loudly they are told."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest
import trio

from tests.conftest import connect, everything, reset, serving, tcp_pair, until
from trioreactor import (
    CloseReason,
    FramedChannel,
    LineCodec,
    ProtocolError,
    ReceiveBufferFull,
    TcpConnection,
    TcpServer,
)
from trioreactor.handler_errors import close_and_log, reason_for

BROKEN = trio.BrokenResourceError("broken")
CLOSED = trio.ClosedResourceError("closed")
PROTOCOL = ProtocolError("no such command")
OWN = ValueError("on purpose")


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The levels of what was logged about handlers."""
    return [r.levelname for r in caplog.records if r.name == "trioreactor.server"]


async def broken_pair() -> tuple[TcpConnection, TcpConnection]:
    """A pair of which the first has found out that the second is gone."""
    left, right = await tcp_pair()
    right.force_close(reset=True)
    with pytest.raises(trio.BrokenResourceError):
        await left.receive_some()
    return left, right


@pytest.mark.parametrize(
    ("error", "reason", "level"),
    [
        (OWN, CloseReason.HANDLER_ERROR, "ERROR"),
        (PROTOCOL, CloseReason.PROTOCOL_ERROR, "WARNING"),
        (ReceiveBufferFull(2, 1), CloseReason.PROTOCOL_ERROR, "WARNING"),
        (ExceptionGroup("", [PROTOCOL, PROTOCOL]), CloseReason.PROTOCOL_ERROR, "WARNING"),
        (ExceptionGroup("", [PROTOCOL, OWN]), CloseReason.HANDLER_ERROR, "ERROR"),
        # Of another connection or file that the handler used: this one is open and well.
        (BROKEN, CloseReason.HANDLER_ERROR, "ERROR"),
        (CLOSED, CloseReason.HANDLER_ERROR, "ERROR"),
    ],
)
async def test_on_an_open_connection(
    error: Exception, reason: CloseReason, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An open connection is closed with the reason that the error gives it, and told of once."""
    caplog.set_level(logging.DEBUG, "trioreactor.server")
    left, right = await tcp_pair(name="the one")
    async with left, right:
        assert reason_for(left, error) is reason
        close_and_log(left, error)
    assert left.close_reason is reason
    (record,) = (r for r in caplog.records if r.name == "trioreactor.server")
    assert record.levelname == level
    assert "the one" in record.getMessage()
    # A peer's mistake needs no traceback.
    assert (record.exc_info is not None) == (level == "ERROR")


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (BROKEN, "DEBUG"),
        (ExceptionGroup("", [BROKEN, ExceptionGroup("", [BROKEN])]), "DEBUG"),
        (OWN, "ERROR"),
        (ExceptionGroup("", [BROKEN, OWN]), "ERROR"),
    ],
)
async def test_on_a_broken_connection(
    error: Exception, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A peer that went away is a debug line, but an error of the handler's own is still told."""
    caplog.set_level(logging.DEBUG, "trioreactor.server")
    left, _ = await broken_pair()
    close_and_log(left, error)
    assert left.close_reason is CloseReason.PEER_RESET
    assert told(caplog) == [level]


@pytest.mark.parametrize("reason", list(CloseReason))
async def test_after_a_close_of_ours(reason: CloseReason, caplog: pytest.LogCaptureFixture) -> None:
    """Using a connection that we have closed, for whichever reason, is only a debug line.

    Whatever made us close it has been told of then.
    """
    caplog.set_level(logging.DEBUG, "trioreactor.server")
    left, right = await tcp_pair()
    async with left, right:
        left.force_close(reason)
        with pytest.raises(trio.ClosedResourceError) as caught:
            left.send(b"too late")
        close_and_log(left, caught.value)
        assert left.close_reason is reason
        assert told(caplog) == ["DEBUG"]
        close_and_log(left, OWN)
        assert told(caplog) == ["DEBUG", "ERROR"]


async def test_protocol_errors_in_groups_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """The log line of a handler that reads in a nursery says what the peer did, each of it, and
    not that there was a nursery.
    """

    async def handler(conn: TcpConnection) -> None:
        async def fail(text: str) -> None:
            with trio.CancelScope(shield=True):
                await both.wait()
            raise ProtocolError(text)

        both = trio.Event()
        async with trio.open_nursery() as nursery:
            for text in await conn.receive_some():
                nursery.start_soon(fail, f"mistake {text:c}")
            both.set()

    server = TcpServer(handler, 0, host="127.0.0.1")
    async with serving(server) as address:
        for count, mistakes in enumerate((b"1", b"23"), 1):
            async with connect(address) as client:
                await client.send_all(mistakes)
                await until(lambda count=count: sum(server.statistics().closed.values()) == count)
    assert dict(server.statistics().closed) == {CloseReason.PROTOCOL_ERROR: 2}
    assert told(caplog) == ["WARNING"] * 2
    lines = [r.getMessage() for r in caplog.records if r.name == "trioreactor.server"]
    assert lines[0].endswith("#1: mistake 1")
    name, _, texts = lines[1].partition("#2: ")
    assert name
    assert sorted(texts.split("; ")) == ["mistake 2", "mistake 3"]


async def test_texts_of_nested_groups(caplog: pytest.LogCaptureFixture) -> None:
    """However deep they are, all are told, in order."""
    left, right = await tcp_pair(name="the one")
    async with right:
        inner = ExceptionGroup("inner", [ProtocolError("b"), ProtocolError("c")])
        close_and_log(left, ExceptionGroup("outer", [ProtocolError("a"), inner]))
    (record,) = (r for r in caplog.records if r.name == "trioreactor.server")
    assert record.getMessage() == "the one: a; b; c"


async def test_a_callbacks_error_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """An error of a callback is logged once, although the handler trips over the close then."""

    def fail(_: TcpConnection) -> None:
        raise OWN

    async def handler(conn: TcpConnection) -> None:
        conn.write_complete_callback = fail
        conn.send(b"x")
        with trio.CancelScope(shield=True):
            await conn.wait_closed()
        conn.send(b"too late")

    server = TcpServer(handler, 0, host="127.0.0.1")
    async with serving(server) as address, connect(address):
        await until(lambda: server.statistics().closed)
    assert dict(server.statistics().closed) == {CloseReason.HANDLER_ERROR: 1}
    assert told(caplog) == ["ERROR"]


async def test_a_health_check(caplog: pytest.LogCaptureFixture) -> None:
    """A peer that connects and resets, as load balancers do, logs nothing and stops nothing."""

    async def handler(conn: TcpConnection) -> None:
        await conn.send_all(b"welcome")
        async for chunk in conn:
            await conn.send_all(chunk)

    server = TcpServer(handler, 0, host="127.0.0.1")
    async with serving(server) as address:
        for turn in range(10):
            client = connect(address)
            reset(client.socket)
            await until(lambda turn=turn: sum(server.statistics().closed.values()) == turn + 1)
        async with connect(address) as client:
            assert await client.receive_some() == b"welcome"
    assert told(caplog) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, CloseReason.LOCAL_CLOSE),
        (OWN, CloseReason.HANDLER_ERROR),
        (PROTOCOL, CloseReason.PROTOCOL_ERROR),
        (KeyboardInterrupt(), CloseReason.LOCAL_CLOSE),
    ],
)
@pytest.mark.parametrize("by_channel", [False, True], ids=["connection", "channel"])
async def test_an_error_leaves_a_block(
    error: BaseException | None, reason: CloseReason, by_channel: bool
) -> None:
    """``async with`` closes for the error's reason, and what is queued goes all the same."""
    left, right = await tcp_pair()
    block = FramedChannel(left, LineCodec()) if by_channel else left
    async with right:
        with pytest.raises(type(error)) if error is not None else nullcontext():
            async with block:
                left.send(b"bye")
                if error is not None:
                    raise error
        assert left.close_reason is reason
        assert await right.receive_some() == b"bye"


async def test_no_more_messages(caplog: pytest.LogCaptureFixture) -> None:
    """A handler whose channel ends where it expects a message has come to the end, not to an error;
    and what it has sent goes, though it does not return.
    """

    async def handler(conn: TcpConnection) -> None:
        channel = FramedChannel(conn, LineCodec())
        channel.send_nowait("your name?")
        await channel.receive()
        channel.send_nowait("your password?")
        await channel.receive()

    server = TcpServer(handler, 0, host="127.0.0.1")
    async with serving(server) as address:
        async with connect(address) as client:
            await client.send_all(b"me\n")
            await client.send_eof()
            assert await everything(client) == b"your name?\nyour password?\n"
        await until(lambda: server.statistics().closed)
        async with connect(address) as client:
            assert await client.receive_some() == b"your name?\n"
            assert (await server.drain(10)).forced == ()
            assert await everything(client) == b""
    closed = dict(server.statistics().closed)
    assert closed == {CloseReason.PEER_EOF: 1, CloseReason.LOCAL_CLOSE: 1}
    assert told(caplog) == []


async def test_no_more_messages_of_another(caplog: pytest.LogCaptureFixture) -> None:
    """EndOfChannel of something else, while the connection is well, is the handler's own error."""

    async def handler(conn: TcpConnection) -> None:
        send, receive = trio.open_memory_channel[None](1)
        send.close()
        await receive.receive()

    server = TcpServer(handler, 0, host="127.0.0.1")
    async with serving(server) as address, connect(address):
        await until(lambda: server.statistics().closed)
    assert dict(server.statistics().closed) == {CloseReason.HANDLER_ERROR: 1}
    assert told(caplog) == ["ERROR"]
