"""Clients with TLS: its handshake is a part of each attempt, and sessions outlive connections."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.conftest import address_of, echo, listening, no_leaks, serving, until
from tests.tls import NAME, client_context, server_context, versions
from trioreactor import (
    CloseReason,
    ConnectAttempt,
    ConnectError,
    TcpClient,
    TcpConnection,
    TcpServer,
    Timeouts,
    open_tcp_connection,
    open_unix_acceptor,
)


def tls_options(**options: Any) -> dict[str, Any]:
    return {
        "ssl_context": client_context(),
        "server_hostname": NAME,
        "backoff": [0.01] * 20,
    } | options


@asynccontextmanager
async def tls_server(handler: Any = echo, **options: Any) -> AsyncIterator[tuple[TcpServer, Any]]:
    options = {"ssl_context": server_context()} | options
    server = TcpServer(handler, 0, host="127.0.0.1", **options)
    async with no_leaks(), serving(server) as address:
        yield server, address


async def say(conn: TcpConnection) -> None:
    await conn.send_all(b"x")
    assert await conn.receive_some() == b"x"


@pytest.mark.parametrize("way", ["run", "block", "loop", "open_tcp_connection"])
async def test_each_way_to_use_it(way: str) -> None:
    """A connection is given when its handshake is done."""
    async with tls_server() as (_, address):
        client = TcpClient(*address, **tls_options())
        seen = []

        async def handler(conn: TcpConnection) -> None:
            seen.append(conn.tls)
            await say(conn)
            client.disconnect()

        if way == "run":
            await client.run(handler)
        elif way == "block":
            async with client:
                await handler(await client.wait_connected())
        elif way == "loop":
            async for conn in client:
                async with client.session(conn):
                    await handler(conn)
        else:
            options = tls_options()
            del options["backoff"]
            async with await open_tcp_connection(*address, **options) as conn:
                await handler(conn)
        assert seen[0] is not None


async def test_the_hosts_name_is_the_one_to_verify() -> None:
    """Unless another is given; it is sent, too (SNI), if it is a name."""
    names: list[str | None] = []

    async def handler(conn: TcpConnection) -> None:
        assert conn.tls is not None
        names.append(conn.tls.server_hostname)
        await echo(conn)

    async with tls_server(handler) as (_, address):
        options: Any = {"ssl_context": client_context()}
        async with await open_tcp_connection("localhost", address[1], **options) as conn:
            await say(conn)
        with pytest.raises(ConnectError, match=r"127\.0\.0\.1"):
            await open_tcp_connection("127.0.0.1", address[1], **options)
    assert names == ["localhost"]


async def test_a_wrong_certificate_is_final() -> None:
    """A name or an authority that will be as wrong at the next attempt: `ConnectError` at once."""
    async with tls_server() as (server, address):
        client = TcpClient(*address, **tls_options(server_hostname="wrong.example"))
        with trio.fail_after(5), pytest.raises(ConnectError) as caught:
            await client.run(echo)
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
        assert len(caught.value.attempts) == 1
        assert client.statistics().failures == {"SSLCertVerificationError": 1}
        assert client.statistics().opened == 0
        await until(lambda: not server.connections)
    assert server.statistics().closed == {CloseReason.HANDSHAKE_FAILED: 1}


async def test_of_several_servers_the_right_one() -> None:
    """A final failure gives up its endpoint only."""
    servers = [
        TcpServer(echo, 0, host="127.0.0.1", ssl_context=server_context(name=name))
        for name in ("wrong.example", NAME)
    ]
    async with (
        no_leaks(),
        serving(servers[0]) as first,
        serving(servers[1]) as second,
        TcpClient(endpoints=[first, second], **tls_options()) as client,
    ):
        conn = await client.wait_connected()
        assert conn.peer_address == second
        await say(conn)
    assert servers[0].statistics().closed == {CloseReason.HANDSHAKE_FAILED: 1}


async def test_what_can_pass_is_tried_again() -> None:
    """A server that breaks the handshake, by a reset or in the open, may be well the next time."""
    attempts: list[ConnectAttempt] = []
    async with no_leaks(), listening() as listener, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def serve() -> None:
            async with await listener.accept() as plain:
                await plain.send_all(b"220 hello\r\n")
            async with await listener.accept() as silent:
                await silent.receive_some()
            stream = await listener.accept()
            async with TcpConnection(stream) as conn:
                await conn.start_tls(server_context(), server_side=True)
                await echo(conn)

        client = TcpClient(*address_of(listener), **tls_options(on_attempt=attempts.append))
        async with client:
            await say(await client.wait_connected())
    assert [type(attempt.error).__name__ for attempt in attempts] == [
        "SSLError",
        attempts[1].error.__class__.__name__,
        "NoneType",
    ]
    assert isinstance(attempts[1].error, OSError)
    assert all(attempt.delay is not None for attempt in attempts[:2])


async def test_a_server_that_stalls(autojump_clock: MockClock) -> None:
    """FAULTS 51. The handshake has `Timeouts.handshake` of its own, beside `connect_timeout`."""
    async with no_leaks(), listening() as listener:
        options = tls_options(timeouts=Timeouts(handshake=3), connect_timeout=1, max_attempts=2)
        client = TcpClient(*address_of(listener), **options)
        start = trio.current_time()
        with pytest.raises(ConnectError, match="within 3 s"):
            await client.run(echo)
        assert trio.current_time() - start == pytest.approx(6, abs=0.1)


@pytest.mark.parametrize("how", ["stop", "disconnect", "cancel"])
async def test_ended_in_the_handshake(how: str) -> None:
    """At once, and nothing is left open."""
    async with no_leaks(), listening() as listener, trio.open_nursery() as nursery:
        client = TcpClient(*address_of(listener), **tls_options())

        @nursery.start_soon
        async def end() -> None:
            async with await listener.accept() as stream:
                # The ClientHello.
                assert await stream.receive_some()
                if how == "cancel":
                    nursery.cancel_scope.cancel()
                else:
                    getattr(client, how)()

        with trio.fail_after(5):
            await client.run(echo)


@versions
async def test_sessions_are_resumed(version: ssl.TLSVersion) -> None:
    """The next connection to the same server needs no certificate, if the context is its own."""
    reused: list[bool] = []
    context = server_context(version)
    async with tls_server(ssl_context=context) as (server, address):
        client = TcpClient(*address, **tls_options())

        async def handler(conn: TcpConnection) -> None:
            assert conn.tls is not None
            await say(conn)
            reused.append(conn.tls.session_reused)
            if len(reused) == 3:
                # Who knows nothing of the session makes a new one.
                server.ssl_context = server_context(version)
            if len(reused) == 4:
                client.disconnect()

        await client.run(handler)
    assert reused == [False, True, True, False]


async def test_reconnecting() -> None:
    """A connection that was cut is followed by another one."""
    cuts = 0

    async def handler(conn: TcpConnection) -> None:
        nonlocal cuts
        await conn.receive_some()
        if cuts < 2:
            cuts += 1
            conn.force_close()
        else:
            await conn.send_all(b"well")

    async with tls_server(handler) as (_, address):
        client = TcpClient(*address, **tls_options())
        heard = []

        async def ask(conn: TcpConnection) -> None:
            await conn.send_all(b"how are you")
            heard.append(await conn.receive_some())
            client.disconnect()

        await client.run(ask)
    assert heard == [b"well"]
    assert client.statistics().opened == 3


async def test_a_unix_socket(tmp_path: Any) -> None:
    """Has no name: one has to be given, if the context checks it."""
    path = tmp_path / "tls.socket"
    async with no_leaks(), trio.open_nursery() as nursery:
        acceptor = await open_unix_acceptor(path)
        server = TcpServer(echo, listeners=[acceptor], ssl_context=server_context())
        await nursery.start(server.serve)
        with pytest.raises(ValueError, match="server_hostname"):
            await open_tcp_connection(path=path, ssl_context=client_context())
        async with await open_tcp_connection(
            path=path, ssl_context=client_context(), server_hostname=NAME
        ) as conn:
            await say(conn)
        server.close()


@pytest.mark.parametrize("make", [TcpClient, open_tcp_connection])
async def test_options(make: Any) -> None:
    """What belongs to TLS wants a context, and that has to be one."""

    async def call(**options: Any) -> None:
        made = make("localhost", 1, **options)
        if not isinstance(made, TcpClient):
            await made

    with pytest.raises(TypeError, match="ssl_context"):
        await call(server_hostname="x")
    with pytest.raises(TypeError, match="ssl_context"):
        await call(https_compatible=True)
    with pytest.raises(TypeError, match="SSLContext"):
        await call(ssl_context="context")
