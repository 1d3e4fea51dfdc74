"""Draining: whoever asked to be told is told once, soon, and in the loop."""

from __future__ import annotations

import contextvars
import gc
import logging
import weakref

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.conftest import address_of, connect, everything, listening, no_leaks, serving, until
from tests.simulated import simulated
from trioreactor import (
    Buffer,
    Callbacks,
    CloseReason,
    ConnectionState,
    TcpClient,
    TcpConnection,
    TcpServer,
    Timeouts,
)

settled = trio.testing.wait_all_tasks_blocked


class Told:
    """A draining callback that notes each call."""

    def __init__(self) -> None:
        self.conns: list[TcpConnection] = []

    def __call__(self, conn: TcpConnection) -> None:
        assert trio.lowlevel.in_trio_run()
        assert conn.draining.is_set()
        self.conns.append(conn)


def echo(conn: TcpConnection, buffer: Buffer) -> None:
    """Send back what came."""
    conn.send(buffer.take())


def finish(conn: TcpConnection) -> None:
    """What a draining callback is for."""
    conn.shutdown()


# -- one connection


async def test_called_once_each_and_soon() -> None:
    """Every callback once, in the order they were added, never inside `start_draining`; those who
    wait for the event are woken, too.
    """
    conn, _ = simulated()
    order: list[int] = []
    for i in range(3):
        conn.add_draining_callback(lambda _, i=i: order.append(i))
    told = Told()
    conn.add_draining_callback(told)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.draining.wait)
        await settled()
        assert not order
        conn.start_draining()
        assert conn.draining.is_set()
        assert not order
        assert not told.conns
    await settled()
    assert order == [0, 1, 2]
    assert told.conns == [conn]
    for _ in range(3):
        conn.start_draining()
    await settled()
    assert order == [0, 1, 2]
    assert told.conns == [conn]
    # Draining by itself closes nothing.
    assert conn.state is ConnectionState.CONNECTED
    conn.force_close()


async def test_added_late() -> None:
    """Added when draining has begun, it is called as well: once, soon, and not at once."""
    conn, _ = simulated()
    conn.start_draining()
    await settled()
    told = Told()
    conn.add_draining_callback(told)
    assert not told.conns
    await settled()
    assert told.conns == [conn]
    conn.start_draining()
    await settled()
    assert told.conns == [conn]
    conn.force_close()


async def test_added_twice_or_by_a_callback() -> None:
    """The same function may be added twice, and a callback may add another."""
    conn, _ = simulated()
    told = Told()
    conn.add_draining_callback(told)
    conn.add_draining_callback(told)
    conn.add_draining_callback(lambda conn: conn.add_draining_callback(told))
    conn.start_draining()
    await settled()
    assert told.conns == [conn] * 3
    conn.force_close()


@pytest.mark.parametrize("when", ["before", "between", "after"])
async def test_a_closed_connection_is_told_nothing(when: str) -> None:
    """Where there is nothing to finish any more, nobody is called."""
    conn, _ = simulated()
    told = Told()
    conn.add_draining_callback(told)
    if when == "before":
        conn.force_close()
    conn.start_draining()
    if when == "between":
        conn.force_close()
    await settled()
    if when == "after":
        assert told.conns == [conn]
        conn.force_close()
    conn.add_draining_callback(told)
    await settled()
    assert told.conns == [conn] * (when == "after")
    assert conn.draining.is_set()


async def test_in_the_context_of_the_dispatch() -> None:
    """With a dispatch running it is called in that task's context, as other callbacks are."""
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who")
    conn, _ = simulated()
    seen: list[str] = []
    conn.add_draining_callback(lambda _: seen.append(who.get()))

    async def serve() -> None:
        who.set("the task that dispatches")
        await conn.dispatch(echo)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        await settled()
        conn.start_draining()
        await settled()
        assert seen == ["the task that dispatches"]
        conn.force_close()


async def test_a_raise_comes_out_of_dispatch() -> None:
    """What it raises comes out of the running dispatch, in the connection's own task."""
    conn, _ = simulated()

    def fail(conn: TcpConnection) -> None:
        raise LookupError("draining failed")

    conn.add_draining_callback(fail)
    async with trio.open_nursery() as nursery:
        raised = trio.Event()

        async def serve() -> None:
            with pytest.raises(LookupError, match="draining failed"):
                await conn.dispatch(echo)
            raised.set()

        nursery.start_soon(serve)
        await settled()
        conn.start_draining()
        with trio.fail_after(10):
            await raised.wait()
    conn.force_close()


async def test_a_raise_without_dispatch(caplog: pytest.LogCaptureFixture) -> None:
    """Where nobody dispatches it is logged, and that connection closed with HANDLER_ERROR; a
    callback after it finds the connection closed and is not called.
    """
    conn, _ = simulated()
    other, _ = simulated()
    told, others = Told(), Told()

    def fail(conn: TcpConnection) -> None:
        raise LookupError("draining failed")

    conn.add_draining_callback(fail)
    conn.add_draining_callback(told)
    other.add_draining_callback(others)
    with caplog.at_level(logging.ERROR, "trioreactor"):
        conn.start_draining()
        other.start_draining()
        await settled()
    assert conn.close_reason is CloseReason.HANDLER_ERROR
    assert not told.conns
    assert others.conns == [other]
    assert other.state is ConnectionState.CONNECTED
    (record,) = caplog.records
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], LookupError)
    other.force_close()


async def test_callbacks_are_let_go() -> None:
    """What they refer to is free once they have been called: the connection keeps none of them."""
    conn, _ = simulated()
    told = Told()
    gone = weakref.ref(told)
    conn.add_draining_callback(told)
    conn.start_draining()
    await settled()
    told.conns.clear()
    del told
    gc.collect()
    assert gone() is None
    conn.force_close()


# -- a server's drain


@pytest.mark.parametrize("connections", [0, 1, 20])
async def test_a_drain_tells_everybody(connections: int) -> None:
    """Each connection's callback is called once with its own connection; one that shuts down
    finishes within the grace, with its last words delivered.
    """
    told = Told()

    def draining(conn: TcpConnection) -> None:
        told(conn)
        conn.send(b"bye")
        conn.shutdown()

    server = TcpServer(Callbacks(message=echo, draining=draining), 0, host="127.0.0.1")
    async with no_leaks(), serving(server) as address:
        clients = [connect(address) for _ in range(connections)]
        await until(lambda: len(server.connections) == connections)
        conns = list(server.connections.values())
        async with trio.open_nursery() as nursery:

            async def leave(client: trio.SocketStream) -> None:
                async with client:
                    assert await everything(client) == b"bye"

            for client in clients:
                nursery.start_soon(leave, client)
            report = await server.drain(30)
        assert (report.finished, report.forced, report.stuck) == (connections, (), ())
        assert sorted(conn.name for conn in told.conns) == sorted(conn.name for conn in conns)
        assert {conn.close_reason for conn in conns} <= {CloseReason.PEER_EOF}


async def test_a_callback_that_does_nothing(autojump_clock: MockClock) -> None:
    """Told, and not finished when the grace is over: force-closed with DRAIN_TIMEOUT."""
    told = Told()
    server = TcpServer(Callbacks(message=echo, draining=told), 0, host="127.0.0.1")
    async with serving(server) as address, connect(address):
        await until(lambda: server.connections)
        (conn,) = server.connections.values()
        report = await server.drain(5)
        assert report.forced == (conn.name,)
        assert report.seconds == pytest.approx(5, abs=0.1)
        assert told.conns == [conn]
        assert conn.close_reason is CloseReason.DRAIN_TIMEOUT


async def test_one_that_raises_ends_its_own_only(caplog: pytest.LogCaptureFixture) -> None:
    """In a server's drain, too: HANDLER_ERROR and one log record for it; the others finish."""
    ends: dict[str, CloseReason | None] = {}

    def draining(conn: TcpConnection) -> None:
        if conn.name.endswith("#2"):
            raise LookupError("draining failed")
        conn.shutdown()

    def connection(conn: TcpConnection) -> None:
        ends[conn.name[-2:]] = conn.close_reason

    server = TcpServer(
        Callbacks(message=echo, draining=draining, connection=connection), 0, host="127.0.0.1"
    )
    with caplog.at_level(logging.ERROR, "trioreactor"):
        async with no_leaks(), serving(server) as address, trio.open_nursery() as nursery:
            clients = [connect(address) for _ in range(3)]
            await until(lambda: len(server.connections) == 3)

            async def leave(client: trio.SocketStream) -> None:
                async with client:
                    await everything(client)

            for client in clients:
                nursery.start_soon(leave, client)
            report = await server.drain(30)
            assert (report.finished, report.forced) == (3, ())
    assert ends == {
        "#1": CloseReason.PEER_EOF,
        "#2": CloseReason.HANDLER_ERROR,
        "#3": CloseReason.PEER_EOF,
    }
    (record,) = caplog.records
    assert record.name == "trioreactor.server"
    assert "#2" in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], LookupError)


async def test_drained_twice() -> None:
    """A second drain tells nobody again."""
    told = Told()
    server = TcpServer(Callbacks(message=echo, draining=told), 0, host="127.0.0.1")
    async with serving(server) as address, connect(address):
        await until(lambda: server.connections)
        (conn,) = server.connections.values()
        with trio.CancelScope() as scope:
            scope.cancel()
            await server.drain(30)
        await settled()
        assert told.conns == [conn]
        await server.drain(0)
        assert told.conns == [conn]


async def test_taken_by_the_drain_itself() -> None:
    """One that the drain takes from the backlog is told, too, though its handler begins after."""
    told = Told()

    def draining(conn: TcpConnection) -> None:
        told(conn)
        conn.shutdown()

    server = TcpServer(Callbacks(message=echo, draining=draining), 0, host="127.0.0.1")
    async with serving(server) as address:
        server.stop_accepting()
        await settled()
        async with connect(address) as client, trio.open_nursery() as nursery:

            async def leave() -> None:
                assert await everything(client) == b""
                await client.send_eof()

            nursery.start_soon(leave)
            report = await server.drain(30)
        assert (report.finished, report.forced) == (1, ())
        assert len(told.conns) == 1


# -- a client's disconnect


async def test_a_client_that_disconnects() -> None:
    """The handler's callback is called once, while input can still be read; then the connection
    ends gracefully and the client does not come back.
    """
    told = Told()
    got: list[bytes] = []

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        got.append(buffer.take())

    async with no_leaks(), listening() as listener:
        client = TcpClient(*address_of(listener))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run, Callbacks(message=on_message, draining=told))
            with trio.fail_after(10):
                stream = await listener.accept()
            async with stream:
                await until(lambda: client.connection is not None and client.connection.delivering)
                conn = client.connection
                assert conn is not None
                conn.send(b"last words")
                client.disconnect()
                client.disconnect()
                assert not told.conns
                assert await everything(stream) == b"last words"
                await until(lambda: told.conns)
                await stream.send_all(b"good bye")
        assert told.conns == [conn]
        assert b"".join(got) == b"good bye"
        assert conn.close_reason is CloseReason.PEER_EOF


async def test_a_client_cannot_send_any_more(caplog: pytest.LogCaptureFixture) -> None:
    """`disconnect` half-closes at once, so a callback that sends meets a closed connection. That
    is no error of the handler's: nothing is logged, and input is still read.
    """
    tried: list[bool] = []
    got: list[bytes] = []

    def draining(conn: TcpConnection) -> None:
        tried.append(True)
        conn.send(b"bye")

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        got.append(buffer.take())

    with caplog.at_level(logging.WARNING, "trioreactor"):
        async with listening() as listener:
            client = TcpClient(*address_of(listener), timeouts=Timeouts(linger=30))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.run, Callbacks(message=on_message, draining=draining))
                with trio.fail_after(10):
                    stream = await listener.accept()
                async with stream:
                    await until(lambda: client.connection and client.connection.delivering)
                    client.disconnect()
                    assert await everything(stream) == b""
                    await until(lambda: tried)
                    await stream.send_all(b"good bye")
    assert tried == [True]
    assert b"".join(got) == b"good bye"
    assert not caplog.records
