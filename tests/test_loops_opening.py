"""What comes before a connection is its handler's, where connections live in several loops: a PROXY
header, TLS, both; each in the connection's own loop, and every limit over all of them.
"""

from __future__ import annotations

import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio

from tests.conftest import connect, until
from tests.servers import assert_echoes, rest_of
from tests.test_server_loops import answer, by_loop, close_all, either_mode, pooled
from tests.tls import NAME, client_context, server_context
from trioreactor import (
    CloseReason,
    EventLoop,
    Limits,
    ProxyProtocol,
    TcpConnection,
    TcpServer,
    Timeouts,
    encode_proxy_header,
    open_tcp_connection,
)

TRUSTING = ProxyProtocol(trusted=["127.0.0.1/32"])


def header_of(client: int) -> bytes:
    """Of one of many clients."""
    return encode_proxy_header(2, (f"192.0.2.{client}", 1000), ("198.51.100.2", 443))


@asynccontextmanager
async def over_tls(server: TcpServer, **options: Any) -> AsyncIterator[TcpConnection]:
    """A client whose handshake is done."""
    async with await open_tcp_connection(
        *server.addresses[0][:2],
        ssl_context=client_context(),
        server_hostname=NAME,
        **options,
    ) as conn:
        yield conn


async def assert_answers(conn: TcpConnection) -> None:
    """It is served."""
    await conn.send_all(b"hello")
    assert await conn.receive_some() == b"hello"


@either_mode
async def test_tls_begins_in_the_connections_loop(handler: Any) -> None:
    """Every loop shakes hands by itself."""
    loops: set[EventLoop] = set()
    context = server_context()
    context.sni_callback = lambda *_: loops.add(EventLoop.current())
    async with pooled(handler, ssl_context=context) as server, AsyncExitStack() as stack:
        for _ in range(4):
            await assert_answers(await stack.enter_async_context(over_tls(server)))
        assert sorted(by_loop(server).values()) == [2, 2]
        assert loops == set(by_loop(server))
        assert all(conn.tls is not None for conn in server.connections.values())


async def test_a_new_certificate_is_every_loops() -> None:
    """`ssl_context` that is set while serving holds for newcomers in all loops."""
    context = server_context()
    context.verify_mode = ssl.CERT_NONE
    asked: Counter[EventLoop] = Counter()
    other = server_context()
    other.sni_callback = lambda *_: asked.update([EventLoop.current()])

    async def echo(conn: TcpConnection) -> None:
        async for chunk in conn:
            await conn.send_all(chunk)

    async with pooled(echo, ssl_context=context) as server, AsyncExitStack() as stack:
        for _ in range(2):
            await assert_answers(await stack.enter_async_context(over_tls(server)))
        assert not asked
        server.ssl_context = other
        for _ in range(2):
            await assert_answers(await stack.enter_async_context(over_tls(server)))
        assert sorted(asked.values()) == [1, 1]


@either_mode
async def test_a_header_is_read_in_the_connections_loop(handler: Any) -> None:
    """The client is known there and to whoever looks at `connections`."""
    async with pooled(handler, proxy_protocol=TRUSTING) as server:
        proxies = [connect(server.addresses[0]) for _ in range(6)]
        for number, proxy in enumerate(proxies):
            await proxy.send_all(header_of(number))
            await assert_echoes(proxy)
        assert {conn.peer_address for conn in server.connections.values()} == {
            (f"192.0.2.{number}", 1000) for number in range(6)
        }
        assert sorted(by_loop(server).values()) == [3, 3]
        for proxy in proxies:
            await proxy.aclose()


async def churn(server: TcpServer, admitted: Counter[int], client: int) -> None:
    """One connection of *client*."""
    async with connect(server.addresses[0]) as proxy:
        await proxy.send_all(header_of(client))
        try:
            await proxy.send_all(b"hello")
            if await proxy.receive_some() == b"hello":
                admitted[client] += 1
        except trio.BrokenResourceError:
            pass


@either_mode
async def test_a_clients_share_is_over_all_loops(handler: Any) -> None:
    """`per_peer` counts a client wherever its connections are, and forgets it when they end."""
    async with pooled(handler, 3, proxy_protocol=TRUSTING, limits=Limits(per_peer=2)) as server:
        proxies = [connect(server.addresses[0]) for _ in range(12)]
        for number, proxy in enumerate(proxies):
            await proxy.send_all(header_of(number // 2))
            await assert_echoes(proxy)
        for number in range(6):
            async with connect(server.addresses[0]) as third:
                await third.send_all(header_of(number))
                assert await rest_of(third) == b""
        assert server.statistics().rejected == {"per_peer": 6}
        await proxies.pop(0).aclose()
        await until(lambda: len(server.connections) == 11)
        # The accept loop hears of it with its next turn.
        await trio.testing.wait_all_tasks_blocked(0.01)
        again = connect(server.addresses[0])
        await again.send_all(header_of(0))
        await assert_echoes(again)
        for proxy in [*proxies, again]:
            await proxy.aclose()
        await until(lambda: not server.connections)
        await until(lambda: not server._limiter._peers)
        assert server._limiter._permits == 0


async def test_shares_under_churn() -> None:
    """Loops that let clients in and out at once lose no count."""

    async def echo(conn: TcpConnection) -> None:
        await conn.send_all(await conn.receive_some())

    admitted: Counter[int] = Counter()
    async with pooled(echo, 3, proxy_protocol=TRUSTING, limits=Limits(per_peer=2)) as server:
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                for number in range(15):
                    nursery.start_soon(churn, server, admitted, number % 5)
        await until(lambda: not server.connections)
        await until(lambda: not server._limiter._peers)
        assert server._limiter._permits == 0
        statistics = server.statistics()
        assert sum(admitted.values()) + statistics.rejected.get("per_peer", 0) == 300
        assert min(admitted.values()) >= 20


async def test_a_header_and_then_tls() -> None:
    """The PROXY header comes first, in the open."""
    seen: list[Any] = []

    async def handler(conn: TcpConnection) -> None:
        seen.append((conn.peer_address, conn.tls is not None))
        async for chunk in conn:
            await conn.send_all(chunk)

    async with (
        pooled(handler, ssl_context=server_context(), proxy_protocol=TRUSTING) as server,
        over_tls(server, proxy_protocol=2) as conn,
    ):
        await assert_answers(conn)
        assert seen == [(conn.local_address, True)]


@either_mode
async def test_handshakes_that_stall(handler: Any) -> None:
    """They end in time in every loop, and are in nobody's way."""
    timeouts = Timeouts(handshake=0.2)
    async with pooled(handler, ssl_context=server_context(), timeouts=timeouts) as server:
        stalled = [connect(server.addresses[0]) for _ in range(6)]
        async with over_tls(server) as conn:
            await assert_answers(conn)
        for client in stalled:
            assert await rest_of(client) == b""
        await until(
            lambda: server.statistics().closed.get(CloseReason.HANDSHAKE_FAILED) == len(stalled)
        )
        close_all(stalled)


async def test_ending_while_they_shake_hands() -> None:
    """`close` ends those that are being opened, in every loop."""

    async def never(conn: TcpConnection) -> None:
        pytest.fail("its handshake was never done")

    async with pooled(never, ssl_context=server_context()) as server:
        stalled = [connect(server.addresses[0]) for _ in range(4)]
        await until(lambda: len(server.connections) == 4)
        server.close()
        for client in stalled:
            assert await rest_of(client) == b""
        close_all(stalled)
        await until(lambda: not server.connections)


async def test_no_room_in_a_loops_epoll(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be served behind a proxy gives its place back as nobody's."""

    async def echo(conn: TcpConnection) -> None:
        async for chunk in conn:
            await conn.send_all(chunk)

    async with pooled(echo, proxy_protocol=TRUSTING, limits=Limits(per_peer=1)) as server:
        made = TcpConnection.from_socket

        def refuse(sock: socket.socket, **options: Any) -> TcpConnection:
            raise OSError(28, "no space in epoll")

        monkeypatch.setattr(TcpConnection, "from_socket", refuse)
        async with connect(server.addresses[0]) as client:
            await until(lambda: server.statistics().shed == 1)
            assert await rest_of(client) == b""
        monkeypatch.setattr(TcpConnection, "from_socket", made)
        client = connect(server.addresses[0])
        await client.send_all(header_of(1))
        await answer(client)
        client.socket.close()
        await until(lambda: not server._limiter._peers)
