"""A server with TLS: all that works in the open works over it."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.conftest import echo, everything, no_leaks, serving, until
from tests.tls import NAME, client_context, server_context
from trioreactor import (
    Buffer,
    Callbacks,
    CloseReason,
    ConnectionState,
    FramedChannel,
    LineCodec,
    ProtocolError,
    SocketOptions,
    TcpConnection,
    TcpServer,
    Timeouts,
    TlsInfo,
    Watermarks,
    open_tcp_connection,
    serve_tcp,
)

settled = trio.testing.wait_all_tasks_blocked


def send_back(conn: TcpConnection, buffer: Buffer) -> None:
    conn.send(buffer.take())


either_mode = pytest.mark.parametrize(
    "handler", [echo, Callbacks(message=send_back)], ids=["coroutine", "dispatch"]
)


@asynccontextmanager
async def tls_server(handler: Any, **options: Any) -> AsyncIterator[tuple[TcpServer, Any]]:
    """A server with TLS, and its address."""
    options = {"ssl_context": server_context()} | options
    server = TcpServer(handler, 0, host="127.0.0.1", **options)
    async with no_leaks(), serving(server) as address:
        yield server, address


async def connected(address: Any, **options: Any) -> TcpConnection:
    """A client of it."""
    options = {"ssl_context": client_context(), "server_hostname": NAME} | options
    return await open_tcp_connection(*address, **options)


@either_mode
async def test_serving(handler: Any) -> None:
    """A handler, and callbacks with no task, get plaintext; ALPN and all are known to them."""
    context = server_context()
    context.set_alpn_protocols(["echo"])
    clients = client_context()
    clients.set_alpn_protocols(["echo"])
    async with tls_server(handler, ssl_context=context) as (server, address):
        async with await connected(address, ssl_context=clients) as client:
            for size in 1, 100_000:
                await client.send_all(bytes(size))
                got = 0
                while got < size:
                    got += len(await client.receive_some())
            (conn,) = server.connections.values()
            assert isinstance(conn.tls, TlsInfo)
            assert conn.tls.alpn_protocol == "echo"
            assert conn.state is ConnectionState.CONNECTED
            assert conn.statistics().bytes_received == 100_001
        await until(lambda: not server.connections)
    assert server.statistics().closed == {CloseReason.PEER_EOF: 1}


@either_mode
async def test_a_handshake_that_stalls(
    autojump_clock: MockClock, handler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """FAULTS 51. It has its deadline, and is in nobody's way."""
    async with tls_server(handler, timeouts=Timeouts(handshake=3)) as (server, address):
        stalled = [await trio.open_tcp_stream(*address) for _ in range(20)]
        await until(lambda: len(server.connections) == 20)
        with trio.fail_after(1):
            async with await connected(address) as client:
                await client.send_all(b"x")
                assert await client.receive_some() == b"x"
        assert server.statistics().active >= 20
        with caplog.at_level(logging.WARNING, "trioreactor.server"):
            await trio.sleep(3.5)
        assert not server.connections
        for stream in stalled:
            await stream.aclose()
    closed = server.statistics().closed
    assert closed == {CloseReason.HANDSHAKE_FAILED: 20, CloseReason.PEER_EOF: 1}


@either_mode
async def test_a_handshake_that_fails(handler: Any) -> None:
    """It ends its own connection, which no handler sees."""
    async with tls_server(handler) as (server, address):
        async with await trio.open_tcp_stream(*address) as plain:
            await plain.send_all(b"GET / HTTP/1.1\r\n\r\n")
            # An alert, and the end.
            assert b"GET" not in await everything(plain)
        async with await connected(address) as client:
            await client.send_all(b"x")
            assert await client.receive_some() == b"x"
        await until(lambda: not server.connections)
    closed = server.statistics().closed
    assert closed == {CloseReason.HANDSHAKE_FAILED: 1, CloseReason.PEER_EOF: 1}


async def test_a_certificate_replaced_while_serving() -> None:
    """`ssl_context` may be set: it holds for newcomers, and the others stay."""
    async with tls_server(echo) as (server, address), await connected(address) as old:
        server.ssl_context = server_context(name="new.example")
        with pytest.raises(OSError, match=r"(?i)hostname mismatch|not valid for"):
            await connected(address)
        async with await connected(address, server_hostname="new.example") as new:
            for client in old, new:
                await client.send_all(b"x")
                assert await client.receive_some() == b"x"


async def test_what_the_context_may_be() -> None:
    """A wrong one is refused at once, and so is one for a server that serves without."""
    wrong: Any = "context"
    with pytest.raises(TypeError, match="SSLContext"):
        TcpServer(echo, 0, ssl_context=wrong)
    server = TcpServer(echo, 0, host="127.0.0.1")
    assert server.ssl_context is None
    async with serving(server):
        with pytest.raises(RuntimeError, match="without TLS"):
            server.ssl_context = server_context()
    with pytest.raises(TypeError, match="https_compatible"):
        TcpServer(echo, 0, https_compatible=True)


@pytest.mark.parametrize("https_compatible", [False, True])
async def test_a_client_that_cuts(https_compatible: bool) -> None:
    """FAULTS 52. No close_notify is an error to the handler, or with `https_compatible` an EOF."""
    ends: list[str] = []

    async def handler(conn: TcpConnection) -> None:
        try:
            await conn.receive_some()
            await conn.send_all(b"y")
            assert await everything(conn) == b""
            ends.append("EOF")
        except trio.BrokenResourceError:
            ends.append("cut")
            raise

    async with tls_server(handler, https_compatible=https_compatible) as (server, address):
        client = await connected(address)
        await client.send_all(b"x")
        # With session tickets unread, its close would be a reset.
        assert await client.receive_some() == b"y"
        client.force_close()
        await until(lambda: not server.connections and ends)
    assert ends == (["EOF"] if https_compatible else ["cut"])
    reason = CloseReason.PEER_EOF if https_compatible else CloseReason.PEER_RESET
    assert server.statistics().closed == {reason: 1}


async def test_serve_tcp() -> None:
    """Takes the options, too."""
    async with trio.open_nursery() as nursery:

        async def serve(task_status: Any) -> None:
            await serve_tcp(
                echo, 0, host="127.0.0.1", task_status=task_status, ssl_context=server_context()
            )

        (acceptor,) = await nursery.start(serve)
        async with await connected(acceptor.address) as client:
            await client.send_all(b"x")
            assert await client.receive_some() == b"x"
        nursery.cancel_scope.cancel()


@either_mode
async def test_broadcast(handler: Any) -> None:
    """To all whose handshake is done, and to nobody in the open."""
    async with tls_server(handler) as (server, address):
        clients = [await connected(address) for _ in range(3)]
        plain = await trio.open_tcp_stream(*address)
        await until(
            lambda: (
                sum(c.state is ConnectionState.CONNECTED for c in server.connections.values()) == 3
                and len(server.connections) == 4
            )
        )
        assert server.broadcast(b"news") == 3
        for client in clients:
            assert await client.receive_some() == b"news"
            client.force_close()
        assert server.connections
        await plain.aclose()


@either_mode
async def test_draining(handler: Any) -> None:
    """Handlers that return say close_notify; those in a handshake are ended with the others."""
    got = []
    async with tls_server(
        Callbacks(message=send_back, draining=TcpConnection.shutdown)
        if isinstance(handler, Callbacks)
        else until_draining
    ) as (server, address):
        client = await connected(address)
        await client.send_all(b"x")
        assert await client.receive_some() == b"x"
        stalled = await trio.open_tcp_stream(*address)
        await until(lambda: len(server.connections) == 2)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def leave() -> None:
                got.append(await client.receive_some())
                await client.aclose()

            report = await server.drain(0.1)
        await stalled.aclose()
    assert got == [b""]
    assert len(report.forced) == 1


async def until_draining(conn: TcpConnection) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo, conn)
        await conn.draining.wait()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("idle", [True, False])
async def test_deadlines(autojump_clock: MockClock, idle: bool) -> None:
    """Idleness, and the first byte, count from when the handshake is done."""
    timeouts = Timeouts(idle=2) if idle else Timeouts(first_byte=2)
    async with tls_server(echo, timeouts=timeouts) as (server, address):
        client = await connected(address)
        start = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
        assert trio.current_time() - start == pytest.approx(2, abs=0.1)
    reason = CloseReason.IDLE_TIMEOUT if idle else CloseReason.FIRST_BYTE_TIMEOUT
    assert server.statistics().closed == {reason: 1}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ProtocolError("no"), CloseReason.PROTOCOL_ERROR),
        (ValueError("no"), CloseReason.HANDLER_ERROR),
    ],
)
async def test_a_handler_that_raises(error: Exception, reason: CloseReason) -> None:
    """Ends its connection, whose peer sees that it was cut."""

    async def handler(conn: TcpConnection) -> None:
        raise error

    async with tls_server(handler) as (server, address):
        client = await connected(address)
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
    assert server.statistics().closed == {reason: 1}


async def test_messages() -> None:
    """A channel over TLS, with answers that are gathered."""

    async def handler(conn: TcpConnection) -> None:
        channel = FramedChannel(conn, LineCodec())
        async for line in channel:
            await channel.send(line.upper())

    async with (
        tls_server(handler) as (_, address),
        FramedChannel(await connected(address), LineCodec()) as channel,
    ):
        for number in range(1000):
            await channel.send(f"line {number}")
        for number in range(1000):
            assert await channel.receive() == f"LINE {number}"


async def test_a_slow_reader() -> None:
    """Backpressure: high and low come in pairs, and all of it arrives."""
    size = 3_000_000

    async def handler(conn: TcpConnection) -> None:
        for _ in range(300):
            if not conn.send(bytes(size // 300)):
                await conn.wait_send_all_might_not_block()

    marks = Watermarks(high=20_000, low=5_000)
    small = SocketOptions(send_buffer=32768, receive_buffer=32768)
    async with tls_server(handler, watermarks=marks, socket_options=small) as (server, address):
        client = await connected(address, socket_options=small)
        await settled()
        (conn,) = server.connections.values()
        assert conn.congested
        assert len(await everything(client)) == size
        counts = conn.statistics()
        assert counts.pauses == counts.resumes > 0
        assert counts.bytes_sent == size
        await client.aclose()


@pytest.mark.parametrize("linger", [2.0, None])
async def test_last_words(linger: float | None) -> None:
    """With unread input, a handler that returns still has its last bytes arrive."""

    async def handler(conn: TcpConnection) -> None:
        await conn.receive_some(1)
        await conn.send_all(b"last words")

    async with tls_server(handler, timeouts=Timeouts(linger=linger)) as (_, address):
        client = await connected(address)
        await client.send_all(bytes(1000))
        assert await everything(client) == b"last words"
        await client.aclose()


async def test_trio_speaks_to_it() -> None:
    """trio's own TLS, with its close and without."""
    async with tls_server(echo) as (server, address):
        for https_compatible in False, True:
            stream = await trio.open_ssl_over_tcp_stream(
                *address, ssl_context=lenient(), https_compatible=https_compatible
            )
            await stream.send_all(b"x" * 100_000)
            got = 0
            while got < 100_000:
                got += len(await stream.receive_some())
            await stream.aclose()
        await until(lambda: not server.connections)
    closed = server.statistics().closed
    assert closed == {CloseReason.PEER_EOF: 1, CloseReason.PEER_RESET: 1}


def lenient() -> ssl.SSLContext:
    context = client_context()
    context.check_hostname = False
    return context
