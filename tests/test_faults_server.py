"""What goes wrong inside a server, and how it ends: FAULTS 34 and 36 to 40."""

from __future__ import annotations

import errno
import logging
from typing import Any

import pytest
import trio
import trio.testing

from tests.conftest import cancelled_after, connect, echo, no_leaks, reset, serving, until
from tests.servers import (
    Handler,
    assert_echoes,
    balanced,
    clients,
    closed,
    local,
    rest_of,
    silent,
)
from trioreactor import (
    Acceptor,
    Callbacks,
    CloseReason,
    ConnectionState,
    Limits,
    TcpConnection,
    Timeouts,
)

# -- force_close, from everywhere (34)


async def force_in_handler(conn: TcpConnection) -> None:
    await conn.receive_some()
    conn.force_close()
    conn.force_close(CloseReason.PROTOCOL_ERROR)
    await trio.sleep_forever()


async def force_while_receiving(conn: TcpConnection) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_force_soon, conn)
        await echo(conn)


async def force_while_sending(conn: TcpConnection) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_force_soon, conn)
        while True:
            await conn.send_all(bytes(65536))


async def force_while_waiting(conn: TcpConnection) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_force_soon, conn)
        nursery.start_soon(conn.wait_closed)
        conn.send(bytes(16 << 20))
        nursery.start_soon(conn.wait_drained)


async def force_while_closing(conn: TcpConnection) -> None:
    conn.send(bytes(16 << 20))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_force_soon, conn)
        await conn.aclose()


async def _force_soon(conn: TcpConnection) -> None:
    for _ in range(10):
        await trio.lowlevel.checkpoint()
    conn.force_close()
    conn.force_close(CloseReason.PROTOCOL_ERROR)


def force_in_message(conn: TcpConnection, buffer: Any) -> None:
    conn.force_close()
    conn.force_close(CloseReason.PROTOCOL_ERROR)


def force_on_write_complete(conn: TcpConnection) -> None:
    force_in_message(conn, None)


def force_on_high_water(conn: TcpConnection, size: int) -> None:
    force_in_message(conn, None)


def answer(conn: TcpConnection, buffer: Any) -> None:
    buffer.take()
    conn.send(b"x")


def flood(conn: TcpConnection, buffer: Any) -> None:
    buffer.take()
    conn.send(bytes(16 << 20))


@pytest.mark.parametrize(
    "handler",
    [
        force_in_handler,
        force_while_receiving,
        force_while_sending,
        force_while_waiting,
        force_while_closing,
        pytest.param(Callbacks(message=force_in_message), id="in-message"),
        pytest.param(
            Callbacks(message=answer, write_complete=force_on_write_complete),
            id="in-write-complete",
        ),
        pytest.param(
            Callbacks(message=flood, high_water_mark=force_on_high_water), id="in-high-water-mark"
        ),
    ],
)
@pytest.mark.parametrize("reading", [True, False], ids=["reads", "stuck"])
async def test_force_close_from_everywhere(
    handler: Handler, reading: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Twice from the handler, a callback or another task, whatever is going on: one close, with
    the first reason, everybody woken, no error (FAULTS 34; C, F, T)."""

    async def first_is_bad(conn: TcpConnection) -> None:
        await (handler if conn.name.endswith("#1") else echo)(conn)

    server = local(first_is_bad)
    async with no_leaks(), serving(server) as address, clients(address, 2) as (client, other):
        await client.send_all(b"x")
        if reading:
            await rest_of(client)
        await until(lambda: server.statistics().closed)
        await assert_echoes(other)
        assert closed(server) == {CloseReason.FORCED: 1}
    assert not [r for r in caplog.records if r.levelno >= logging.INFO]


async def test_force_close_from_another_task() -> None:
    """Anybody in the loop may end a connection; only that one ends."""
    server = local(silent)
    async with no_leaks(), serving(server) as address, clients(address, 3) as streams:
        await until(lambda: len(server.connections) == 3)
        first, second, third = server.connections.values()
        second.force_close(CloseReason.HEARTBEAT_TIMEOUT, reset=True)
        assert second.state is ConnectionState.DISCONNECTED
        with pytest.raises(trio.BrokenResourceError):
            await streams[1].receive_some()
        await until(lambda: len(server.connections) == 2)
        assert closed(server) == {CloseReason.HEARTBEAT_TIMEOUT: 1}
        assert server.broadcast(b"hello") == 2
        assert first.state is third.state is ConnectionState.CONNECTED


async def test_force_close_after(autojump_clock: trio.testing.MockClock) -> None:
    """A delayed force_close comes at its time, replaces an earlier one, and dies with an earlier
    end."""
    ends: dict[str, float] = {}

    async def handler(conn: TcpConnection) -> None:
        number = conn.name.rpartition("#")[2]
        conn.force_close_after(5)
        if number == "2":
            conn.force_close_after(9)
        try:
            if number != "3":
                await trio.sleep_forever()
        finally:
            ends[number] = trio.current_time() - begun

    server = local(handler)
    begun = trio.current_time()
    async with no_leaks(), serving(server) as address, clients(address, 3):
        await until(lambda: server.statistics().opened == 3)
        await until(lambda: not server.connections)
        # So that a timer left behind would have its chance.
        await trio.sleep(10)
    assert ends == pytest.approx({"1": 5, "2": 9, "3": 0}, abs=0.1)
    assert closed(server) == {CloseReason.FORCED: 2, CloseReason.LOCAL_CLOSE: 1}


# -- a handler's own errors (36, 37)


async def test_a_cleanup_that_raises_too(caplog: pytest.LogCaptureFixture) -> None:
    """If a handler's cleanup raises as well, one line tells of both, and the server goes on."""

    async def handler(conn: TcpConnection) -> None:
        try:
            if await conn.receive_some() == b"raise":
                raise ValueError("the first error")
        finally:
            raise OSError("the second error")

    server = local(handler)
    async with no_leaks(), serving(server) as address, clients(address, 2) as (bad, other):
        await bad.send_all(b"raise")
        assert await rest_of(bad) == b""
        await until(lambda: len(server.connections) == 1)
        assert closed(server) == {CloseReason.HANDLER_ERROR: 1}
        (record,) = caplog.records
        assert caplog.text.index("the first error") < caplog.text.index("the second error")
        assert record.exc_info is not None
        assert isinstance(record.exc_info[1], OSError)
        assert isinstance(record.exc_info[1].__context__, ValueError)
        await other.send_all(b"x")
        await until(lambda: not server.connections)


async def test_a_cleanup_that_raises_keeps_the_first_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A cleanup that raises after a reset or a force_close does not change why it ended."""

    async def handler(conn: TcpConnection) -> None:
        try:
            await echo(conn)
        finally:
            raise OSError("the cleanup failed")

    server = local(handler)
    async with no_leaks(), serving(server) as address, clients(address, 2) as streams:
        await until(lambda: len(server.connections) == 2)
        first, _ = server.connections.values()
        first.force_close(CloseReason.IDLE_TIMEOUT)
        await until(lambda: len(server.connections) == 1)
        reset(streams[1].socket)
        await until(lambda: not server.connections)
        assert closed(server) == {CloseReason.IDLE_TIMEOUT: 1, CloseReason.PEER_RESET: 1}
    assert [r.levelno for r in caplog.records] == [logging.ERROR] * 2


async def test_a_handler_that_asks_a_dead_peers_name(caplog: pytest.LogCaptureFixture) -> None:
    """Asking for the name of a peer that has reset already ends that connection only."""
    asked = []

    async def handler(conn: TcpConnection) -> None:
        try:
            conn.socket.getpeername()
        finally:
            asked.append(conn.name)
        await echo(conn)

    server = local(handler)
    async with no_leaks(), serving(server) as address:
        server.stop_accepting()
        reset(connect(address).socket)
        async with clients(address, 1) as (client,):
            server.resume_accepting()
            await assert_echoes(client)
            names = [f"server-{address[0]}:{address[1]}#{n}" for n in (1, 2)]
            assert sorted(asked) == names
            await until(lambda: list(server.connections) == names[1:])
    assert len([r for r in caplog.records if r.levelno >= logging.INFO]) <= 1


async def test_every_handler_raises_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """A hundred handlers that raise together leave a server that serves (C, F, T)."""

    async def handler(conn: TcpConnection) -> None:
        if await conn.receive_some() == b"raise":
            raise ValueError("a bug in the handler")
        await conn.send_all(b"fine")

    server = local(handler)
    async with no_leaks(), serving(server) as address:
        async with clients(address, 100) as streams:
            for stream in streams:
                await stream.send_all(b"raise")
            await until(lambda: server.statistics().closed.get(CloseReason.HANDLER_ERROR) == 100)
        async with clients(address, 1) as (client,):
            await client.send_all(b"x")
            assert await rest_of(client) == b"fine"
        await until(lambda: not server.connections)
    assert closed(server) == {CloseReason.HANDLER_ERROR: 100, CloseReason.LOCAL_CLOSE: 1}
    assert len(caplog.records) == 100


# -- a shortage between accept and the handler


async def test_a_connection_that_cannot_be_registered_ends_alone(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Where the kernel has no room to watch one more descriptor, that client is told and the
    others are served (C, F)."""
    make = TcpConnection.from_socket
    shortage = [OSError(number, "no room to watch it") for number in (errno.ENOSPC, errno.ENOMEM)]

    def fail(*args: Any, **kwargs: Any) -> TcpConnection:
        if shortage:
            raise shortage.pop()
        return make(*args, **kwargs)

    server = local(echo)
    async with no_leaks(), serving(server) as address, clients(address, 1) as (old,):
        await assert_echoes(old)
        monkeypatch.setattr(TcpConnection, "from_socket", fail)
        for _ in range(2):
            async with clients(address, 1) as (client,):
                assert await rest_of(client) == b""
        await assert_echoes(old)
        async with clients(address, 1) as (new,):
            await assert_echoes(new)
        assert server.statistics().shed == 2
        assert server.statistics().opened == 2
        assert balanced(server)


# -- the end: drain (38, 39, 40)


async def polite(conn: TcpConnection) -> None:
    """Serves until the server drains, then says goodbye."""
    await conn.draining.wait()
    await conn.send_all(b"bye")


async def test_drain_lets_handlers_finish(autojump_clock: trio.testing.MockClock) -> None:
    """Handlers that heed `draining` end well within the grace; serve() returns."""
    server = local(polite)
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        async with clients(acceptor.address, 3) as streams:
            await until(lambda: len(server.connections) == 3)
            with trio.testing.assert_checkpoints():
                report = await server.drain(60)
            assert (report.finished, report.forced, report.stuck) == (3, (), ())
            assert report.seconds < 1
            for stream in streams:
                assert await rest_of(stream) == b"bye"
    assert closed(server) == {CloseReason.LOCAL_CLOSE: 3}


async def test_drain_forces_who_does_not_finish(autojump_clock: trio.testing.MockClock) -> None:
    """After exactly the grace the rest is closed with DRAIN_TIMEOUT, and named."""

    async def handler(conn: TcpConnection) -> None:
        await (polite if conn.name.endswith("#2") else echo)(conn)

    server = local(handler, name="s")
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        host, port = acceptor.address
        async with clients((host, port), 3) as streams:
            await until(lambda: len(server.connections) == 3)
            begun = trio.current_time()
            report = await server.drain(5)
            assert report.finished == 1
            assert report.forced == (f"s-{host}:{port}#1", f"s-{host}:{port}#3")
            assert report.stuck == ()
            assert report.seconds == trio.current_time() - begun
            assert report.seconds == pytest.approx(5, abs=0.05)
            assert [await rest_of(stream) for stream in streams] == [b"", b"bye", b""]
    assert closed(server) == {CloseReason.LOCAL_CLOSE: 1, CloseReason.DRAIN_TIMEOUT: 2}


async def test_connections_are_served_during_the_grace(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Draining stops newcomers, not conversations."""
    server = local(echo)
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        async with clients(acceptor.address, 1) as (client,):
            await until(lambda: server.connections)
            (conn,) = server.connections.values()
            nursery.start_soon(server.drain, 60)
            await conn.draining.wait()
            with pytest.raises(ConnectionRefusedError):
                connect(acceptor.address)
            await assert_echoes(client)
            await client.aclose()
    assert closed(server) == {CloseReason.PEER_EOF: 1}


@pytest.mark.parametrize(
    ("linger", "unwind"), [(0.5, 0.5), (None, 2.0), (0, 0.0)], ids=["set", "off", "zero"]
)
async def test_drain_names_who_shields_itself(
    linger: float | None, unwind: float, autojump_clock: trio.testing.MockClock
) -> None:
    """A handler that will not be cancelled is reported, in time; the server ends when it does
    (FAULTS 38, D)."""
    release = trio.Event()

    async def handler(conn: TcpConnection) -> None:
        if conn.name.endswith("#1"):
            with trio.move_on_after(3600, shield=True):
                await release.wait()
        else:
            await trio.sleep_forever()

    server = local(handler, timeouts=Timeouts(linger=linger))
    ended = trio.Event()

    async def serve(*, task_status: trio.TaskStatus[list[Acceptor]]) -> None:
        await server.serve(task_status=task_status)
        ended.set()

    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(serve)
        async with clients(acceptor.address, 2) as streams:
            await until(lambda: len(server.connections) == 2)
            stuck, other = server.connections
            report = await server.drain(3)
            assert report.forced == (stuck, other)
            assert stuck in report.stuck
            # With no time at all to unwind, the other one may still be about to.
            assert unwind == 0 or report.stuck == (stuck,)
            assert report.seconds == pytest.approx(3 + unwind, abs=0.05)
            # Its socket is closed all the same.
            for stream in streams:
                assert await rest_of(stream) == b""
            await trio.testing.wait_all_tasks_blocked()
            assert not ended.is_set()
            assert list(server.connections) == [stuck]
            release.set()
        await ended.wait()
    assert closed(server) == {CloseReason.DRAIN_TIMEOUT: 2}


@pytest.mark.parametrize("how", ["aclose", "detach", "reset"])
async def test_drain_cancels_a_handler_whose_connection_is_closed_already(how: str) -> None:
    """A handler that goes on after its connection's end is cancelled like any other (T)."""
    streams: list[trio.SocketStream] = []

    async def handler(conn: TcpConnection) -> None:
        if how == "aclose":
            await conn.aclose()
        elif how == "detach":
            streams.append(conn.detach()[0])
        await trio.sleep_forever()

    server = local(handler)
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        async with clients(acceptor.address, 1) as (client,):
            await until(lambda: server.connections)
            await trio.testing.wait_all_tasks_blocked()
            if how == "reset":
                reset(client.socket)
                await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(10):
                report = await server.drain(0)
            assert report.stuck == ()
        for stream in streams:
            await trio.aclose_forcefully(stream)
    assert balanced(server)
    assert sum(closed(server).values()) == 1


async def test_drain_flushes_what_was_sent() -> None:
    """A handler that returns at the drain gets its last words through (B)."""
    size = 4 << 20

    async def handler(conn: TcpConnection) -> None:
        await conn.draining.wait()
        conn.send(bytes(size))

    server = local(handler)
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        async with clients(acceptor.address, 1) as (client,):
            await until(lambda: server.connections)
            nursery.start_soon(server.drain, 60)
            assert len(await rest_of(client)) == size


async def test_drain_takes_those_who_wait_in_the_backlog() -> None:
    """Who is connected in the client's eyes is served at a drain, not reset (FAULTS 40)."""

    async def handler(conn: TcpConnection) -> None:
        assert conn.draining.is_set()
        await conn.send_all(await conn.receive_some())

    server = local(handler)
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        server.stop_accepting()
        async with clients(acceptor.address, 50) as streams:
            for n, stream in enumerate(streams):
                await stream.send_all(b"%d" % n)
            report = await server.drain(20)
            assert report.finished == 50
            for n, stream in enumerate(streams):
                assert await rest_of(stream) == b"%d" % n
    assert closed(server) == {CloseReason.LOCAL_CLOSE: 50}


async def test_drain_while_full() -> None:
    """At a full limit, drain ends; those above it are told, not left hanging (C, D)."""
    server = local(polite, limits=Limits(connections=2))
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        async with clients(acceptor.address, 5) as streams:
            await until(lambda: len(server.connections) == 2)
            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(10):
                report = await server.drain(5)
            assert (report.finished, report.forced) == (2, ())
            assert [await rest_of(stream) for stream in streams[:2]] == [b"bye"] * 2
            assert [await rest_of(stream) for stream in streams[2:]] == [b""] * 3
    assert closed(server) == {CloseReason.LOCAL_CLOSE: 2}


async def test_drain_twice(autojump_clock: trio.testing.MockClock) -> None:
    """Two drains at once agree, the shorter grace decides, and one afterwards has nothing to do."""
    server = local(echo)
    reports = []

    async def drain(grace: float) -> None:
        reports.append(await server.drain(grace))

    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        async with clients(acceptor.address, 2):
            await until(lambda: len(server.connections) == 2)
            async with trio.open_nursery() as drains:
                drains.start_soon(drain, 10)
                drains.start_soon(drain, 5)
        report = await server.drain(5)
    assert [len(r.forced) for r in reports] == [2, 0]
    assert [r.seconds for r in reports] == pytest.approx([5, 5], abs=0.05)
    assert (report.finished, report.forced, report.stuck) == (0, (), ())
    assert closed(server) == {CloseReason.DRAIN_TIMEOUT: 2}


async def test_close_during_a_drain(autojump_clock: trio.testing.MockClock) -> None:
    """Whoever loses patience ends the drain with close()."""
    server = local(echo)
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        async with clients(acceptor.address, 2) as streams:
            await until(lambda: len(server.connections) == 2)
            nursery.start_soon(server.drain, 3600)
            await trio.testing.wait_all_tasks_blocked()
            begun = trio.current_time()
            server.close()
            for stream in streams:
                assert await rest_of(stream) == b""
        assert trio.current_time() - begun < 1
    assert closed(server) == {CloseReason.FORCED: 2}


async def test_a_handler_may_drain_its_server() -> None:
    """A handler that awaits drain() is one of those that get closed; the server still ends."""

    async def handler(conn: TcpConnection) -> None:
        if await conn.receive_some() == b"drain":
            await server.drain(0)
        await trio.sleep_forever()

    server = local(handler)
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        async with clients(acceptor.address, 3) as streams:
            await until(lambda: len(server.connections) == 3)
            await streams[0].send_all(b"drain")
            for stream in streams:
                assert await rest_of(stream) == b""
    assert closed(server) == {CloseReason.DRAIN_TIMEOUT: 3}


@pytest.mark.parametrize("grace", [-1, float("nan")])
async def test_a_grace_that_is_no_time(grace: float) -> None:
    """A grace below zero is refused, and nothing has begun."""
    server = local(echo)
    async with serving(server) as address, clients(address, 1) as (client,):
        with pytest.raises(ValueError, match="at least 0 seconds"):
            await server.drain(grace)
        await assert_echoes(client)


async def test_drain_cancelled_at_every_point() -> None:
    """A cancelled drain leaves the server draining, and close() then ends it (C, F, T)."""
    async with no_leaks():
        await _cancel_drains()


async def _cancel_drains() -> None:
    outcomes = set()
    for turns in range(15):
        server = local(polite if turns % 2 else echo)
        async with trio.open_nursery() as nursery:
            (acceptor,) = await nursery.start(server.serve)
            async with clients(acceptor.address, 3) as streams:
                await until(lambda server=server: len(server.connections) == 3)  # type: ignore[misc]
                cancelled = await cancelled_after(turns, lambda server=server: server.drain(60))  # type: ignore[misc]
                outcomes.add(cancelled)
                if turns and cancelled:
                    with pytest.raises(ConnectionRefusedError):
                        connect(acceptor.address)
                server.close()
                for stream in streams:
                    await rest_of(stream)
        assert sum(closed(server).values()) == 3
    assert outcomes == {True, False}
