"""serve_tcp: takes the place of trio.serve_tcp with only the import changed."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trioreactor
from tests.conftest import connect, no_leaks, reset, until
from tests.servers import ServeTcp, serving_tcp
from trioreactor import CloseReason, Limits, SocketOptions, TcpConnection, Timeouts

both = pytest.mark.parametrize(
    "serve_tcp", [trio.serve_tcp, trioreactor.serve_tcp], ids=["trio", "trioreactor"]
)


async def for_streams(stream: trio.SocketStream) -> None:
    """A handler as one writes it for trio, with all that a SocketStream has."""
    peer = stream.socket.getpeername()
    assert stream.socket.getsockname()[0] == "127.0.0.1"
    assert stream.socket.family == socket.AF_INET
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == bytes(8)
    await stream.send_all(f"hello {peer[1]}".encode())
    await stream.wait_send_all_might_not_block()
    async with stream:
        async for chunk in stream:
            await stream.send_all(chunk)
        assert await stream.receive_some(10) == b""
        await stream.send_all(b"bye")
        await stream.send_eof()


@both
async def test_a_handler_for_streams_serves(serve_tcp: ServeTcp) -> None:
    """A handler written for trio.SocketStream serves the same under both, and what
    `nursery.start` gives suits trio's own tools."""
    async with no_leaks(), trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(serve_tcp, for_streams, 0, host="127.0.0.1"))
        for _ in range(3):
            async with await trio.testing.open_stream_to_socket_listener(listener) as client:
                await client.send_all(b"some words")
                await client.send_eof()
                received = b""
                async for chunk in client:
                    received += chunk
                port = client.socket.getsockname()[1]
                assert received == f"hello {port}some wordsbye".encode()
        nursery.cancel_scope.cancel()


def test_the_arguments_are_trios() -> None:
    """Every parameter of trio.serve_tcp is there, of the same kind and with the same default."""
    ours = inspect.signature(trioreactor.serve_tcp).parameters
    for name, theirs in inspect.signature(trio.serve_tcp).parameters.items():
        assert ours[name].kind is theirs.kind
        assert ours[name].default is theirs.default
    assert list(ours)[:2] == ["handler", "port"]


@both
async def test_a_handler_that_returns_closes_the_connection(serve_tcp: ServeTcp) -> None:
    """A handler need not close."""

    async def handler(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"hello")

    async with (
        no_leaks(),
        serving_tcp(serve_tcp, handler) as address,
        connect(address) as client,
    ):
        assert await client.receive_some() == b"hello"
        assert await client.receive_some() == b""


@both
async def test_handlers_run_in_the_handler_nursery(serve_tcp: ServeTcp) -> None:
    """With handler_nursery, connections go on when serving has been cancelled."""

    async def handler(stream: trio.abc.ReceiveStream) -> None:
        async for chunk in stream:
            assert isinstance(stream, (trio.SocketStream, TcpConnection))
            await stream.send_all(chunk)

    async with no_leaks(), trio.open_nursery() as handlers:
        async with serving_tcp(serve_tcp, handler, handler_nursery=handlers) as address:
            client = connect(address)
            await client.send_all(b"one")
            assert await client.receive_some() == b"one"
            assert len(handlers.child_tasks) == 1
        async with client:
            await client.send_all(b"two")
            assert await client.receive_some() == b"two"


@both
async def test_handler_nursery_may_be_any_object_with_start_soon(serve_tcp: ServeTcp) -> None:
    """As trio says: the nursery, or anything that has a start_soon."""
    started = []

    class Counting:
        def start_soon(self, async_fn: Callable[..., Awaitable[object]], *args: object) -> None:
            started.append(async_fn)
            nursery.start_soon(async_fn, *args)

    async def handler(stream: trio.abc.SendStream) -> None:
        await stream.send_all(b"hello")

    async with (
        no_leaks(),
        trio.open_nursery() as nursery,
        serving_tcp(serve_tcp, handler, handler_nursery=Counting()) as address,
        connect(address) as client,
    ):
        assert await client.receive_some() == b"hello"
    assert len(started) == 1


@both
async def test_a_port_in_use(serve_tcp: ServeTcp) -> None:
    """A port that is taken raises OSError."""

    async def handler(stream: object) -> None:
        """Nobody comes."""

    async with no_leaks(), serving_tcp(serve_tcp, handler) as address:
        host, port = address
        with pytest.raises(OSError, match="in use"):
            await serve_tcp(handler, port, host=host)


@both
async def test_backlog(serve_tcp: ServeTcp) -> None:
    """`backlog` is the length of the queue; more than the system's own bound is cut to it."""

    async def handler(stream: object) -> None:
        """Nobody comes."""

    bound = int(Path("/proc/sys/net/core/somaxconn").read_text())
    for backlog in (None, 1, 100, 1_000_000):
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(
                partial(serve_tcp, handler, 0, host="127.0.0.1", backlog=backlog)
            )
            # TCP_INFO of a listening socket has the backlog in `sacked` (linux/tcp.h).
            info = listener.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            assert int.from_bytes(info[28:32], "little") == min(backlog or bound, bound)
            nursery.cancel_scope.cancel()


async def test_a_handler_that_raises_ends_only_its_connection() -> None:
    """What ends trio.serve_tcp is here the end of one connection."""

    async def handler(stream: Any) -> None:
        async for chunk in stream:
            if chunk == b"raise":
                raise ValueError("a bug in the handler")
            await stream.send_all(chunk)

    async with (
        no_leaks(),
        serving_tcp(trioreactor.serve_tcp, handler) as address,
        connect(address) as good,
        connect(address) as bad,
    ):
        await bad.send_all(b"raise")
        assert await bad.receive_some() == b""
        reset(connect(address).socket)
        await good.send_all(b"hello")
        assert await good.receive_some() == b"hello"

    async def with_trio() -> None:
        async with (
            serving_tcp(trio.serve_tcp, handler) as address,
            connect(address) as bad,
        ):
            await bad.send_all(b"raise")
            await trio.sleep_forever()

    with pytest.raises(ExceptionGroup) as caught:
        await with_trio()
    assert caught.group_contains(ValueError)


async def test_server_options_are_handed_on() -> None:
    """Everything that TcpServer takes can be given, and `backlog` beside socket options."""
    seen: list[TcpConnection] = []

    async def handler(conn: TcpConnection) -> None:
        seen.append(conn)
        await conn.receive_some()
        conn.force_close(CloseReason.IDLE_TIMEOUT)

    options = {
        "name": "drop-in",
        "limits": Limits(connections=1, when_full="reject"),
        "timeouts": Timeouts(linger=1),
        "socket_options": SocketOptions(send_buffer=40_000),
        "backlog": 7,
    }
    async with no_leaks(), serving_tcp(trioreactor.serve_tcp, handler, **options) as address:
        async with connect(address) as first:
            await until(lambda: seen)
            assert seen[0].name == f"drop-in-127.0.0.1:{address[1]}#1"
            assert seen[0].getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 80_000
            async with connect(address) as second:
                assert await second.receive_some() == b""
            await first.send_all(b"x")
            assert await first.receive_some() == b""
        assert len(seen) == 1


async def test_unknown_options_are_refused() -> None:
    """A misspelt option is a TypeError, not silence."""

    async def handler(conn: TcpConnection) -> None:
        """Nobody comes."""

    with pytest.raises(TypeError, match="limit_connections"):
        await trioreactor.serve_tcp(handler, 0, limit_connections=3)


async def test_looking_at_the_socket_changes_no_option() -> None:
    """`conn.socket` and `conn.stream` are for looking: the connection's options stay."""
    seen = []

    async def handler(conn: TcpConnection) -> None:
        conn.set_no_delay(False)
        before = conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
        seen.append(conn.socket.getpeername() == conn.peer_address)
        seen.append(conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0)
        seen.append(conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == before)

    async with (
        no_leaks(),
        serving_tcp(trioreactor.serve_tcp, handler) as address,
        connect(address) as client,
    ):
        assert await client.receive_some() == b""
    assert seen == [True] * 3


async def test_the_socket_serves_until_the_end() -> None:
    """Looking at the socket does not change how the connection closes (F)."""

    async def handler(conn: TcpConnection) -> None:
        assert conn.socket is conn.stream.socket
        with conn.socket.dup() as copy:
            assert copy.getpeername() == conn.peer_address
        await conn.send_all(bytes(1 << 20))

    async with (
        no_leaks(),
        serving_tcp(trioreactor.serve_tcp, handler) as address,
        connect(address) as client,
    ):
        received = 0
        async for chunk in client:
            received += len(chunk)
        assert received == 1 << 20
