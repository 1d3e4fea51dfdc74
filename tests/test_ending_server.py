"""The end of a server in peace: newcomers are heard, and the grace is kept."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing

from tests.conftest import everything, no_leaks, until
from trioreactor import (
    FramedChannel,
    LineCodec,
    TcpConnection,
    TcpServer,
    Timeouts,
    serve_until_signalled,
)
from trioreactor.ending_server import end_gracefully


async def upper(conn: TcpConnection) -> None:
    channel = FramedChannel(conn, LineCodec())
    async for line in channel:
        await channel.send(line.upper())


async def stubborn(conn: TcpConnection) -> None:
    with trio.CancelScope(shield=True):
        await trio.sleep(100)


@asynccontextmanager
async def serving(server: TcpServer) -> AsyncIterator[trio.Nursery]:
    async with no_leaks(), trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        yield nursery


async def connect(server: TcpServer) -> trio.SocketStream:
    address = server.addresses[0]
    assert isinstance(address, tuple)
    return await trio.open_tcp_stream(*address[:2])


async def test_a_newcomer_is_heard(autojump_clock: trio.testing.MockClock) -> None:
    """Its first question is answered, though the server drains when it comes; then it ends, at
    once.
    """
    server = TcpServer(upper, 0, host="127.0.0.1")
    async with serving(server) as nursery, await connect(server) as stream:
        nursery.start_soon(end_gracefully, server, 10)
        await trio.sleep(0.5)
        assert not server.addresses
        begun = trio.current_time()
        await stream.send_all(b"hello\n")
        assert await everything(stream) == b"HELLO\n"
        assert trio.current_time() - begun < 0.2


async def test_who_says_nothing_has_a_second(autojump_clock: trio.testing.MockClock) -> None:
    """Of the grace, which it does not make longer."""
    for grace, expected in ((10, 1.0), (0.3, 0.3), (0, 0)):
        server = TcpServer(upper, 0, host="127.0.0.1")
        async with serving(server) as nursery, await connect(server) as stream:
            begun = trio.current_time()
            nursery.start_soon(end_gracefully, server, grace)
            assert await everything(stream) == b""
            assert trio.current_time() - begun == pytest.approx(expected, abs=0.1)


async def test_those_who_wait_are_left_to_others(autojump_clock: trio.testing.MockClock) -> None:
    """Where another process listens on the same socket, who is in its queue is not taken."""
    for take_waiting in (True, False):
        server = TcpServer(upper, 0, host="127.0.0.1")
        async with serving(server):
            server.stop_accepting()
            async with await connect(server):
                await end_gracefully(server, 0.1, take_waiting=take_waiting)
        assert server.statistics().opened == take_waiting


async def test_stop_listening(autojump_clock: trio.testing.MockClock) -> None:
    """Connections live on, newcomers are refused, and `serve` returns after the last one."""
    server = TcpServer(upper, 0, host="127.0.0.1")
    async with no_leaks(), trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        address = server.addresses[0]
        assert isinstance(address, tuple)
        async with await connect(server) as stream:
            await stream.send_all(b"a\n")
            assert await stream.receive_some() == b"A\n"
            for _ in range(2):
                server.stop_listening()
            assert server.addresses == []
            with pytest.raises(OSError, match="attempts to connect"):
                await trio.open_tcp_stream(*address[:2])
            await stream.send_all(b"b\n")
            assert await stream.receive_some() == b"B\n"
        await trio.testing.wait_all_tasks_blocked()
    assert server.statistics().opened == 1


async def test_the_log_says_who_is_stuck(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """With the names of those whose handlers do not end, and how long it took in all."""
    caplog.set_level(logging.INFO, "trioreactor.server")
    server = TcpServer(stubborn, 0, host="127.0.0.1", timeouts=Timeouts(linger=1))
    async with serving(server), await connect(server):
        await trio.testing.wait_all_tasks_blocked()
        report = await end_gracefully(server, 3)
        assert report.seconds == pytest.approx(4, abs=0.1)
        assert len(report.forced) == len(report.stuck) == 1
    lines = [record.getMessage() for record in caplog.records]
    assert "server: drained in 4.0" in lines[0]
    assert f"though they are cancelled: {report.stuck[0]}" in lines[1]


async def test_the_log_has_it_though_the_last_one_leaves(caplog: pytest.LogCaptureFixture) -> None:
    """The server has ended then, before the drain has looked again."""
    caplog.set_level(logging.INFO, "trioreactor.server")
    server = TcpServer(upper, 0, host="127.0.0.1")
    async with no_leaks(), trio.open_nursery() as nursery:
        await nursery.start(partial(serve_until_signalled, server, grace=10))
        async with await connect(server):
            await until(lambda: server.connections)
            os.kill(os.getpid(), signal.SIGTERM)
            await until(lambda: not server.addresses)
    (record,) = caplog.records
    assert ", 0 were closed by force" in record.getMessage()
