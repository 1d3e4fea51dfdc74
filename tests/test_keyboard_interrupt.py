"""Ctrl-C at the worst moment is a KeyboardInterrupt, not a broken run."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing

from tests.conftest import connect, no_leaks, tcp_streams
from tests.simulated import simulated
from trioreactor import Callbacks, Limits, ProxyProtocol, TcpConnection, TcpServer
from trioreactor.connection_callbacks import Handler
from trioreactor.server_connections import ServerConnections
from trioreactor.watches import Watches


async def receive(conn: TcpConnection) -> None:
    """Parks in receive_some."""
    await conn.receive_some()


async def dispatch(conn: TcpConnection) -> None:
    """Parks in dispatch."""
    await conn.dispatch(lambda conn, buffer: None)


@pytest.mark.parametrize("handler", [receive, dispatch])
def test_just_before_a_task_parks(
    handler: Callable[[TcpConnection], Awaitable[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between noting the task and parking it, the interrupt waits for a checkpoint."""
    real = trio.lowlevel.wait_task_rescheduled
    raised = 0

    async def interrupted(abort: Any) -> Any:
        nonlocal raised
        if trio.lowlevel.current_task().name.startswith("server-"):
            raised += 1
            signal.raise_signal(signal.SIGINT)
        return await real(abort)

    async def main() -> None:
        server = TcpServer(handler, 0, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            (acceptor,) = await nursery.start(server.serve)
            monkeypatch.setattr(trio.lowlevel, "wait_task_rescheduled", interrupted)
            async with await trio.testing.open_stream_to_socket_listener(acceptor):
                await trio.sleep(10)

    with pytest.RaisesGroup(KeyboardInterrupt, flatten_subgroups=True, allow_unwrapped=True):
        trio.run(main)
    assert raised == 1


def test_inside_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel has taken is counted, though the interrupt came right after it did."""

    async def main() -> None:
        left, right = await tcp_streams()
        conn = TcpConnection(left)
        real = conn._sock.send

        def send(data: bytes) -> int:
            sent = real(data)
            signal.raise_signal(signal.SIGINT)
            return sent

        conn._write._sock = type("Sock", (), {"send": staticmethod(send)})()
        try:
            conn.send(b"hello")
            assert conn.statistics().bytes_sent == 5
            assert await right.receive_some() == b"hello"
        finally:
            conn.force_close()
            await trio.aclose_forcefully(right)

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)


def broadcast(conn: TcpConnection, data: bytes) -> None:
    """To one that has nothing queued."""
    TcpServer(receive, 0).broadcast(data, to=[conn])


def uncork(conn: TcpConnection, data: bytes) -> None:
    """What was gathered goes."""
    conn.cork()
    conn.send(data)
    conn.uncork()


@pytest.mark.parametrize("send", [TcpConnection.send, broadcast, uncork])
def test_no_hole_in_the_stream(
    send: Callable[[TcpConnection, bytes], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """B: an interrupt right after the kernel has taken a part does not lose the rest."""

    async def main() -> None:
        conn, sock = simulated(room=10)
        real = sock.send

        def interrupted(data: bytes) -> int:
            sent = real(data)
            signal.raise_signal(signal.SIGINT)
            return sent

        monkeypatch.setattr(sock, "send", interrupted)
        with suppress(KeyboardInterrupt):
            send(conn, b"a" * 100)
        statistics = conn.statistics()
        assert (statistics.bytes_sent, statistics.buffered) == (10, 90)
        conn.force_close()

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)


@pytest.mark.parametrize("handler", [receive, Callbacks(message=lambda *_: None)])
@pytest.mark.parametrize("interrupted", [(Watches, "begin"), (ServerConnections, "_start_task")])
def test_nobody_is_left_behind(
    handler: Handler, interrupted: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """F and C: it comes when a connection is entered and has no task yet, or is opened and has no
    handler yet; when `serve` has ended it is closed and counted.
    """
    real = getattr(*interrupted)
    proxy = ProxyProtocol(trusted=["127.0.0.1/32"])
    server = TcpServer(
        handler, 0, host="127.0.0.1", proxy_protocol=proxy, limits=Limits(per_peer=1)
    )

    def interrupting(self: Any, *args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        return real(self, *args, **options)

    async def main() -> None:
        async with no_leaks():
            with pytest.RaisesGroup(KeyboardInterrupt, flatten_subgroups=True):
                async with trio.open_nursery() as nursery:
                    (acceptor,) = await nursery.start(server.serve)
                    monkeypatch.setattr(*interrupted, interrupting)
                    async with connect(acceptor.address) as client:
                        await client.send_all(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
                        await trio.sleep(10)

    trio.run(main)
    statistics = server.statistics()
    assert (statistics.opened, statistics.active) == (1, 0)
    assert sum(statistics.closed.values()) == 1
    assert not server.connections
    assert (server._limiter._permits, server._limiter._peers) == (0, {})
