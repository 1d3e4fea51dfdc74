"""ServerConnections: callbacks without a task keep every promise that a task keeps."""

from __future__ import annotations

import contextvars
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.conftest import connect, everything, no_leaks, reset, serving, until
from trioreactor import (
    Buffer,
    Callbacks,
    CloseReason,
    ConnectionState,
    LengthHeaderCodec,
    ProtocolError,
    TcpConnection,
    TcpServer,
    Timeouts,
    Watermarks,
)


def echo(conn: TcpConnection, buffer: Buffer) -> None:
    """Send back what has come."""
    conn.send(buffer.take())


class Ups:
    """What the connection callback is told, and the connections it is told of."""

    def __init__(self) -> None:
        self.told: list[tuple[ConnectionState, CloseReason | None]] = []
        self.conns: list[TcpConnection] = []

    def __call__(self, conn: TcpConnection) -> None:
        self.told.append((conn.state, conn.close_reason))
        if conn not in self.conns:
            self.conns.append(conn)


def server_of(message: Any = echo, **options: Any) -> TcpServer:
    """A server with this callback on loopback."""
    callbacks = {name: options.pop(name) for name in ("connection", "draining") if name in options}
    return TcpServer(Callbacks(message=message, **callbacks), 0, host="127.0.0.1", **options)


@asynccontextmanager
async def served(server: TcpServer) -> AsyncIterator[trio.SocketStream]:
    """A client of *server* that has been answered, and then is up to the block."""
    async with no_leaks(), serving(server) as address:
        client = connect(address)
        try:
            await client.send_all(b"hello")
            assert await client.receive_some() == b"hello"
            yield client
        finally:
            client.socket.close()


class Spawned(trio.abc.Instrument):
    """Remembers the names of connections' tasks."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        if task.name.startswith("server-"):
            self.names.append(task.name)


# -- no task


@pytest.mark.parametrize("connection", [None, lambda conn: None])
async def test_connections_have_no_task(connection: Any) -> None:
    """However many there are, callbacks are served by the poller alone. Their end needs a task only
    where somebody is to be told, or it has to wait.
    """
    server = server_of(connection=connection)
    async with no_leaks(), serving(server) as address:
        spawned = Spawned()
        trio.lowlevel.add_instrument(spawned)
        clients = [connect(address) for _ in range(50)]
        for client in clients:
            await client.send_all(b"hello")
        for client in clients:
            assert await client.receive_some() == b"hello"
        assert len(server.connections) == 50
        assert spawned.names == []
        for client in clients:
            await client.aclose()
        await until(lambda: not server.connections)
        assert server.statistics().closed == {CloseReason.PEER_EOF: 50}
        assert len(spawned.names) == (50 if connection else 0)
        trio.lowlevel.remove_instrument(spawned)


async def test_in_somebody_elses_nursery_they_have_tasks() -> None:
    """A nursery that does not know of connections could not end them with its own end."""
    server = server_of()

    async def hold(*, task_status: trio.TaskStatus[trio.Nursery]) -> None:
        async with trio.open_nursery() as held:
            task_status.started(held)
            await trio.sleep_forever()

    async with no_leaks(), trio.open_nursery() as outer:
        nursery = await outer.start(hold)
        (acceptor,) = await outer.start(partial(server.serve, handler_nursery=nursery))
        spawned = Spawned()
        trio.lowlevel.add_instrument(spawned)
        async with connect(acceptor.address[:2]) as client:
            await client.send_all(b"hello")
            assert await client.receive_some() == b"hello"
            assert spawned.names == list(server.connections)
            trio.lowlevel.remove_instrument(spawned)
            nursery.cancel_scope.cancel()
            await until(lambda: not server.connections)
        assert server.statistics().closed == {CloseReason.CANCELLED: 1}
        server.close()


async def test_callbacks_of_another_kind_are_called() -> None:
    """A subclass that serves in its own way does so."""
    served_by: list[str] = []

    class Mine(Callbacks):
        async def __call__(self, conn: TcpConnection) -> None:
            served_by.append(conn.name)
            await super().__call__(conn)

    server = TcpServer(Mine(message=echo), 0, host="127.0.0.1")
    async with served(server) as client:
        assert served_by == list(server.connections)
        await client.aclose()
        await until(lambda: not server.connections)


# -- every end


def raising(error: BaseException) -> Callable[[TcpConnection, Buffer], None]:
    """A callback that raises at the second message."""

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        data = buffer.take()
        if data != b"hello":
            raise error
        conn.send(data)

    return on_message


def doing(fn: Callable[[TcpConnection], object]) -> Callable[[TcpConnection, Buffer], None]:
    """A callback that does something at the second message."""

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        data = buffer.take()
        if data == b"hello":
            conn.send(data)
        else:
            fn(conn)

    return on_message


async def _eof(server: TcpServer, client: trio.SocketStream) -> None:
    await client.send_eof()
    assert await everything(client) == b""


async def _reset(server: TcpServer, client: trio.SocketStream) -> None:
    reset(client.socket)


async def _say(server: TcpServer, client: trio.SocketStream) -> None:
    await client.send_all(b"now")
    with suppress(trio.BrokenResourceError):
        await client.receive_some()


async def _from_outside(server: TcpServer, client: trio.SocketStream) -> None:
    (conn,) = server.connections.values()
    conn.force_close(CloseReason.IDLE_TIMEOUT)


async def _aclose(server: TcpServer, client: trio.SocketStream) -> None:
    (conn,) = server.connections.values()
    await conn.aclose()


async def _drain(server: TcpServer, client: trio.SocketStream) -> None:
    report = await server.drain(0)
    assert report.stuck == ()


async def _close(server: TcpServer, client: trio.SocketStream) -> None:
    server.close()


Act = Callable[[TcpServer, trio.SocketStream], Awaitable[None]]
ENDS: list[tuple[Any, Act, CloseReason]] = [
    (echo, _eof, CloseReason.PEER_EOF),
    (echo, _reset, CloseReason.PEER_RESET),
    (echo, _from_outside, CloseReason.IDLE_TIMEOUT),
    (echo, _aclose, CloseReason.LOCAL_CLOSE),
    (echo, _drain, CloseReason.DRAIN_TIMEOUT),
    (echo, _close, CloseReason.FORCED),
    (raising(ValueError("a mistake")), _say, CloseReason.HANDLER_ERROR),
    (raising(ProtocolError("no such word")), _say, CloseReason.PROTOCOL_ERROR),
    (doing(TcpConnection.force_close), _say, CloseReason.FORCED),
    (doing(TcpConnection.shutdown), _say, CloseReason.LOCAL_CLOSE),
]


@pytest.mark.parametrize(("message", "act", "reason"), ENDS)
@pytest.mark.parametrize("watched", [False, True])
async def test_every_end(message: Any, act: Act, reason: CloseReason, watched: bool) -> None:
    """Each end has its reason, is told once, and leaves nothing (C, F, T), whether or not anybody
    hears of it.
    """
    ups = Ups()
    server = server_of(message, timeouts=Timeouts(linger=0.1), connection=ups if watched else None)
    async with served(server) as client:
        await act(server, client)
        await until(lambda: not server.connections)
        statistics = server.statistics()
        assert statistics.closed == {reason: 1}
        assert (statistics.opened, statistics.active) == (1, 0)
        if watched:
            assert ups.told == [
                (ConnectionState.CONNECTED, None),
                (ConnectionState.DISCONNECTED, reason),
            ]


async def test_cancelled() -> None:
    """With the server's scope its connections end, and are told."""
    ups = Ups()
    server = server_of(connection=ups)
    async with no_leaks():
        async with trio.open_nursery() as nursery:
            (acceptor,) = await nursery.start(server.serve)
            clients = [connect(acceptor.address[:2]) for _ in range(5)]
            await until(lambda: len(ups.conns) == 5)
            nursery.cancel_scope.cancel()
        assert server.statistics().closed == {CloseReason.CANCELLED: 5}
        assert len(ups.told) == 10
        assert not server.connections
        for client in clients:
            await client.aclose()


async def test_what_is_queued_at_the_eof_is_sent() -> None:
    """A peer that half-closes and reads slowly gets everything, from a connection that waits for
    it.
    """
    size = 20_000_000

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        if buffer.take() == b"hello":
            conn.send(b"hello")
        else:
            conn.send(bytes(size))

    async with served(server_of(on_message)) as client:
        await client.send_all(b"more")
        await client.send_eof()
        assert len(await everything(client)) == size


async def test_nobody_else_may_read() -> None:
    """While callbacks are served, reading is theirs."""
    async with served(server := server_of()) as client:
        (conn,) = server.connections.values()
        with pytest.raises(trio.BusyResourceError):
            conn.detach()
        with pytest.raises(trio.BusyResourceError):
            await conn.receive_some()
        with pytest.raises(trio.BusyResourceError):
            await conn.dispatch(echo)
        await client.send_all(b"still")
        assert await client.receive_some() == b"still"


async def test_an_eof_inside_a_message(caplog: pytest.LogCaptureFixture) -> None:
    """The codec's complaint about the end ends the connection as any of its complaints does."""
    codec = LengthHeaderCodec()
    server = server_of(codec.on_message(lambda conn, message: conn.send(codec.encode(message))))
    async with no_leaks(), serving(server) as address, connect(address) as client:
        await client.send_all(codec.encode(b"whole") + b"\0")
        await client.send_eof()
        assert await everything(client) == codec.encode(b"whole")
        await until(lambda: not server.connections)
    assert server.statistics().closed == {CloseReason.PROTOCOL_ERROR: 1}
    assert "inside a message" in caplog.text


@pytest.mark.parametrize("moment", ["up", "down"])
async def test_a_connection_callback_that_raises(
    moment: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once, and ends that connection only."""

    def connection(conn: TcpConnection) -> None:
        up = conn.state is ConnectionState.CONNECTED
        if up == (moment == "up") and conn.name.endswith("#2"):
            raise ValueError("on purpose")

    server = server_of(connection=connection)
    async with served(server) as first:
        async with connect(server.addresses[0][:2]) as second:
            await second.send_eof()
            assert await everything(second) == b""
        await until(lambda: len(server.connections) == 1)
        await first.send_all(b"still here")
        assert await first.receive_some() == b"still here"
    assert [r.getMessage() for r in caplog.records].count(caplog.records[0].getMessage()) == 1
    assert "on purpose" in caplog.text


async def test_deadlines(autojump_clock: MockClock) -> None:
    """A deadline ends one as any other connection."""
    ups = Ups()
    server = server_of(timeouts=Timeouts(idle=5), connection=ups)
    async with no_leaks(), serving(server) as address, connect(address):
        await until(lambda: ups.conns)
        await ups.conns[0].wait_closed()
        await until(lambda: len(ups.told) == 2)
    assert ups.told[1] == (ConnectionState.DISCONNECTED, CloseReason.IDLE_TIMEOUT)


async def test_a_drain_waits_for_who_finishes() -> None:
    """A draining callback that ends its connection when it is done ends it in time."""
    server = server_of(draining=TcpConnection.shutdown)
    async with served(server) as client:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def leave() -> None:
                assert await everything(client) == b""
                await client.aclose()

            report = await server.drain(10)
        assert report.finished == 1
        assert not report.forced


# -- as with tasks


async def test_each_has_a_context_of_its_own() -> None:
    """What a callback sets is there in its connection's next ones, and in no other's."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen: list[tuple[str, str]] = []

    def connection(conn: TcpConnection) -> None:
        if conn.state is ConnectionState.CONNECTED:
            variable.set("up")
        else:
            seen.append(("down", variable.get()))

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        word = buffer.take().decode()
        seen.append((word, variable.get()))
        variable.set(word)
        conn.send(b".")

    variable.set("outside")
    server = server_of(on_message, connection=connection)
    async with no_leaks(), serving(server) as address:
        async with connect(address) as one, connect(address) as other:
            for client, word in ((one, b"a"), (other, b"b"), (one, b"c"), (other, b"d")):
                await client.send_all(word)
                assert await client.receive_some() == b"."
        await until(lambda: not server.connections)
    assert seen[:4] == [("a", "up"), ("b", "up"), ("c", "a"), ("d", "b")]
    assert sorted(seen[4:]) == [("down", "c"), ("down", "d")]
    assert variable.get() == "outside"


@pytest.mark.parametrize("where", ["message", "up"])
def test_ctrl_c_in_a_callback(where: str) -> None:
    """It leaves the run, and everything is closed."""

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not interrupted")

    async def main() -> None:
        async with no_leaks():
            callbacks = Callbacks(
                message=interrupt if where == "message" else echo,
                connection=interrupt if where == "up" else None,
            )
            server = TcpServer(callbacks, 0, host="127.0.0.1")
            try:
                async with trio.open_nursery() as nursery:
                    (acceptor,) = await nursery.start(server.serve)
                    async with connect(acceptor.address[:2]) as client:
                        await client.send_all(b"hello")
                        await trio.sleep(10)
            finally:
                assert not server.connections

    with pytest.RaisesGroup(KeyboardInterrupt, flatten_subgroups=True, allow_unwrapped=True):
        trio.run(main)


async def test_many_that_come_and_go_beside_each_other() -> None:
    """Ends of every kind at once: opened less closed is what lives, after each turn (C)."""
    server = server_of(
        doing(lambda conn: conn.force_close()),
        watermarks=Watermarks(high=1000, low=10, limit=1024),
        connection=lambda conn: None,
    )
    async with no_leaks(), serving(server) as address:

        async def one(n: int) -> None:
            client = connect(address)
            try:
                await client.send_all(b"hello")
                assert await client.receive_some() == b"hello"
                statistics = server.statistics()
                assert statistics.opened - sum(statistics.closed.values()) == len(
                    server.connections
                )
                if n % 3 == 0:
                    reset(client.socket)
                elif n % 3 == 1:
                    await client.send_all(b"end")
            finally:
                client.socket.close()

        async with trio.open_nursery() as nursery:
            for n in range(90):
                nursery.start_soon(one, n)
        await until(lambda: not server.connections)
        closed = server.statistics().closed
        assert sum(closed.values()) == 90
        assert set(closed) <= {CloseReason.PEER_EOF, CloseReason.PEER_RESET, CloseReason.FORCED}


# -- at its end


@pytest.mark.parametrize("turns", range(6))
async def test_a_newcomer_in_the_turn_of_a_cancellation(turns: int) -> None:
    """C, F, T: whichever task has its turn first, no connection outlives `serve`."""
    for _ in range(20):
        async with no_leaks():
            server = server_of()
            async with trio.open_nursery() as nursery:
                (acceptor,) = await nursery.start(server.serve)
                await trio.testing.wait_all_tasks_blocked()
                client = connect(acceptor.address)
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            assert not server.connections
            client.socket.close()
            counters = server.statistics()
            assert counters.opened == sum(counters.closed.values())


async def test_write_complete_where_data_and_eof_come_together() -> None:
    """It is called before the close, as where a task closes."""
    complete: list[str] = []
    callbacks = Callbacks(message=echo, write_complete=lambda conn: complete.append(conn.name))
    async with serving(TcpServer(callbacks, 0, host="127.0.0.1")) as address:
        for i in range(5):
            async with connect(address) as client:
                # Both are there when it is accepted.
                await client.send_all(b"hello")
                await client.send_eof()
                assert await everything(client) == b"hello"
            await until(lambda i=i: len(complete) == i + 1)  # type: ignore[misc]


async def test_closing_all_by_the_mapping() -> None:
    """One that is force-closed leaves the mapping later, whatever it was at."""
    server = server_of(lambda conn, buffer: None)
    async with no_leaks(), serving(server) as address, trio.open_nursery() as nursery:
        clients = [connect(address) for _ in range(3)]
        await until(lambda: len(server.connections) == 3)
        for conn in server.connections.values():
            conn.stop_reading()
            nursery.start_soon(conn.wait_eof)
        await trio.testing.wait_all_tasks_blocked()
        for client in clients:
            client.socket.close()
        await until(lambda: all(conn.at_eof for conn in server.connections.values()))
        for conn in server.connections.values():
            conn.force_close()
        await until(lambda: not server.connections)


@pytest.mark.parametrize("drains", [False, True])
async def test_a_server_that_is_closed_by_its_first_connection(drains: bool) -> None:
    """Those that were to be accepted with it are not, and nothing else happens."""

    def up(conn: TcpConnection) -> None:
        server.close()

    server = server_of(connection=up)
    async with no_leaks(), serving(server) as address:
        await trio.testing.wait_all_tasks_blocked()
        clients = [connect(address) for _ in range(3)]
        if drains:
            report = await server.drain(1)
            assert report.forced == ()
        for client in clients:
            # Closed, or reset in the backlog.
            with suppress(trio.BrokenResourceError):
                assert await client.receive_some() == b""
            client.socket.close()
    assert server.statistics().opened == 1


async def test_a_peer_that_is_gone_when_it_is_up() -> None:
    """O: what "up" meets of a peer that has reset ends that connection only."""
    met: list[str] = []

    def up(conn: TcpConnection) -> None:
        if conn.state is ConnectionState.CONNECTED:
            with suppress(trio.BrokenResourceError):
                conn.send(b"hello")
            conn.shutdown()
            met.append(conn.name)

    async with serving(server_of(connection=up)) as address:
        for _ in range(3):
            reset(connect(address).socket)
        await until(lambda: len(met) == 3)
        async with connect(address) as client:
            assert await everything(client) == b"hello"


async def test_one_context_from_up_to_down() -> None:
    """What "up" has set "down" sees, though the connection ended in between without a message."""
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="unset")
    seen: list[str] = []

    def connection(conn: TcpConnection) -> None:
        seen.append(name.get())
        name.set("set")
        if conn.state is ConnectionState.CONNECTED:
            conn.force_close()

    async with serving(server_of(connection=connection)) as address:
        async with connect(address) as client:
            assert await client.receive_some() == b""
        await until(lambda: len(seen) == 2)
    assert seen == ["unset", "set"]


async def test_the_peer_has_gone_when_it_is_up() -> None:
    """A send in the connection callback finds that the peer has reset: that connection has ended,
    and the others are served.
    """

    def up(conn: TcpConnection) -> None:
        if conn.state is ConnectionState.CONNECTED:
            with suppress(trio.BrokenResourceError):
                conn.send(b"hello")

    server = server_of(connection=up)
    async with no_leaks(), serving(server) as address:
        server.stop_accepting()
        for _ in range(5):
            reset(connect(address).socket)
        server.resume_accepting()
        await until(lambda: server.statistics().closed == {CloseReason.PEER_RESET: 5})
        client = connect(address)
        assert await client.receive_some() == b"hello"
        client.socket.close()
