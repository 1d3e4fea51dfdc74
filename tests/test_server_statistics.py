"""ServerStatistics and DrainReport: what a server says of itself holds together, and stays."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import trio

from tests.conftest import connect, echo, reset, serving, until
from trioreactor import (
    CloseReason,
    DrainReport,
    Limits,
    ServerStatistics,
    TcpConnection,
    TcpServer,
)
from trioreactor.connection_counters import ConnectionTotals


class EveryStep(trio.abc.Instrument):
    """Asks after every step of every task."""

    def __init__(self, server: TcpServer) -> None:
        self.server = server
        self.seen: list[tuple[ServerStatistics, int]] = []

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.seen.append((self.server.statistics(), len(self.server.connections)))


async def test_every_moment() -> None:
    """Promise C holds after every step of every task: what was opened and not closed is what
    `connections` has.
    """
    server = TcpServer(echo, 0, host="127.0.0.1")
    instrument = EveryStep(server)
    trio.lowlevel.add_instrument(instrument)
    async with serving(server) as address:
        streams = [connect(address) for _ in range(5)]
        for stream in streams:
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
        await streams[0].aclose()
        reset(streams[1].socket)
        await until(lambda: len(server.connections) == 3)
        next(iter(server.connections.values())).force_close()
        await until(lambda: len(server.connections) == 2)
    trio.lowlevel.remove_instrument(instrument)
    for stream in streams:
        await stream.aclose()
    assert len(instrument.seen) > 50
    for now, connections in instrument.seen:
        assert now.opened - sum(now.closed.values()) == now.active == connections
    last = server.statistics()
    assert (last.opened, last.active) == (5, 0)
    assert (last.bytes_received, last.bytes_sent) == (25, 25)
    # One was forced by hand, two by the server's end.
    assert dict(last.closed) == {
        CloseReason.PEER_EOF: 1,
        CloseReason.PEER_RESET: 1,
        CloseReason.FORCED: 3,
    }


async def test_what_was_rejected() -> None:
    """Newcomers that a limit turned away are counted by the limit, and were never opened."""
    server = TcpServer(
        echo, 0, host="127.0.0.1", limits=Limits(connections=3, per_peer=2, when_full="reject")
    )
    async with serving(server) as address:
        streams = []
        for source in ("127.0.0.1", "127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.3"):
            before = server.statistics()
            streams.append(connect(address, source=source))
            await until(lambda before=before: server.statistics() != before)
            # What was given out does not change.
            assert before.opened + sum(before.rejected.values()) == len(streams) - 1
        now = server.statistics()
        assert dict(now.rejected) == {"per_peer": 1, "connections": 1}
        assert (now.opened, now.active, dict(now.closed), now.shed) == (3, 3, {}, 0)
        with pytest.raises(TypeError):
            now.rejected["per_peer"] = 0  # type: ignore[index]
        with pytest.raises(FrozenInstanceError):
            now.opened = 0  # type: ignore[misc]
        for stream in streams:
            await stream.aclose()


def test_the_fields() -> None:
    """It has what a client has, two counts of those that were turned away, and the loop's lag."""
    own = {field.name for field in fields(ServerStatistics)}
    shared = {field.name for field in fields(ConnectionTotals)}
    assert own == shared | {"rejected", "shed", "loop_lag", "loop_holds"}


async def test_the_report_of_a_drain(autojump_clock: trio.testing.MockClock) -> None:
    """It counts those that ended within the grace, and names those that did not, and of those the
    ones that not even that ended.
    """
    deaf_may_end = trio.Event()

    async def handler(conn: TcpConnection) -> None:
        command = await conn.receive_some(1)
        if command == b"g":
            await conn.draining.wait()
        elif command == b"s":
            await trio.sleep_forever()
        else:
            with trio.CancelScope(shield=True):
                await deaf_may_end.wait()

    server = TcpServer(handler, 0, host="127.0.0.1", name="s")
    async with trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        streams = [connect(acceptor.address) for _ in range(4)]
        for stream, command in zip(streams, (b"g", b"g", b"s", b"d"), strict=True):
            await stream.send_all(command)
        await until(lambda: server.statistics().bytes_received == 4)
        names = list(server.connections)
        report = await server.drain(3)
        deaf_may_end.set()
        for stream in streams:
            await stream.aclose()
    assert isinstance(report, DrainReport)
    assert report.finished == 2
    assert report.forced == tuple(names[2:])
    assert report.stuck == (names[3],)
    assert report.seconds >= 3
    assert server.statistics().closed[CloseReason.DRAIN_TIMEOUT] == 2
    with pytest.raises(FrozenInstanceError):
        report.finished = 5  # type: ignore[misc]
