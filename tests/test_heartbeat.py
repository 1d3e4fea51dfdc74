"""Heartbeat: a quiet peer is asked, one that is gone is noticed, and nobody else hears of it."""

from __future__ import annotations

import gc
import logging
import socket
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.conftest import living_tasks, no_leaks, serving, vanish
from tests.namespaces import ip, own_network
from tests.servers import local
from trioreactor import (
    CloseReason,
    Codec,
    ConnectionState,
    FramedChannel,
    Heartbeat,
    JsonLinesCodec,
    LengthHeaderCodec,
    LineCodec,
    TcpConnection,
    TcpServer,
    dispatch_messages,
)
from trioreactor.default_poller import current_poller

__all__ = ["own_network"]

LINES = LineCodec()
ASKS: Heartbeat[str] = Heartbeat(ping="ping", interval=30, timeout=90)
BOTH: Heartbeat[str] = Heartbeat(
    ping="ping",
    is_ping=lambda line: line == "ping",
    pong="pong",
    is_pong=lambda line: line == "pong",
    interval=30,
    timeout=90,
)

Run = Callable[[TcpConnection, Codec[Any], Heartbeat[Any], list[Any]], Awaitable[None]]


async def by_channel(
    conn: TcpConnection, codec: Codec[Any], heartbeat: Heartbeat[Any], got: list[Any]
) -> None:
    """Receive with a heartbeat."""
    async for message in FramedChannel(conn, codec, heartbeat=heartbeat):
        got.append(message)


async def by_dispatch(
    conn: TcpConnection, codec: Codec[Any], heartbeat: Heartbeat[Any], got: list[Any]
) -> None:
    """The same in callback mode."""
    await dispatch_messages(
        conn, codec, lambda _, message: got.append(message), heartbeat=heartbeat
    )


RUNS = [by_channel, by_dispatch]


def pair() -> tuple[TcpConnection, trio.SocketStream]:
    """A connection and its peer."""
    ours, theirs = trio.socket.socketpair()
    return TcpConnection(trio.SocketStream(ours)), trio.SocketStream(theirs)


async def quietly(awaitable: Awaitable[None]) -> None:
    """Until the end, however it comes."""
    with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
        await awaitable


async def sent_to(peer: trio.SocketStream, seen: list[tuple[float, bytes]]) -> None:
    """Note what the peer is sent, and when."""
    with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
        async for chunk in peer:
            seen.append((trio.current_time(), chunk))


@pytest.mark.parametrize("run", RUNS)
async def test_a_silent_peer(run: Run, autojump_clock: MockClock) -> None:
    """It is asked after each interval of silence, and closed after the timeout, to the tick."""
    seen: list[tuple[float, bytes]] = []
    async with no_leaks():
        conn, peer = pair()
        async with peer, trio.open_nursery() as nursery:
            nursery.start_soon(sent_to, peer, seen)
            nursery.start_soon(quietly, run(conn, LINES, ASKS, []))
            await conn.wait_closed()
            assert trio.current_time() == 90
            assert conn.close_reason is CloseReason.HEARTBEAT_TIMEOUT
        assert [(at, text) for at, text in seen if at < 90] == [(30, b"ping\n"), (60, b"ping\n")]


@pytest.mark.parametrize("run", RUNS)
async def test_no_ping_while_data_flows(run: Run, autojump_clock: MockClock) -> None:
    """Nothing is asked while both send; the silence counts from the last that was sent."""
    seen: list[tuple[float, bytes]] = []
    got: list[str] = []
    conn, peer = pair()
    async with peer, trio.open_nursery() as nursery:
        nursery.start_soon(sent_to, peer, seen)
        nursery.start_soon(quietly, run(conn, LINES, BOTH, got))
        for _ in range(20):
            await trio.sleep(29)
            conn.send(b"data\n")
            await peer.send_all(b"data\n")
        assert got.count("data") == len(got) >= 19
        assert {text for _, text in seen} == {b"data\n"}
        await trio.sleep(29)
        assert len(seen) == 20
        await trio.sleep(2)
        assert seen[20:] == [(20 * 29 + 30, b"ping\n")]
        conn.force_close()


@pytest.mark.parametrize("run", RUNS)
async def test_one_that_only_listens(run: Run, autojump_clock: MockClock) -> None:
    """A peer that answers is asked though we send all the time, and so is not taken for gone."""
    conn, peer = pair()
    got: list[str] = []

    async def answer() -> None:
        rest = b""
        async for chunk in peer:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line == b"ping":
                    await peer.send_all(b"pong\n")

    async with peer, trio.open_nursery() as nursery:
        nursery.start_soon(quietly, answer())
        nursery.start_soon(quietly, run(conn, LINES, BOTH, got))
        for _ in range(300):
            await trio.sleep(1)
            conn.send(b"news\n")
        assert got == []
        conn.force_close()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("codec", "ping", "pong", "data"),
    [
        (LINES, "ping", "pong", "data"),
        (LengthHeaderCodec(), b"", b"\1", b"data"),
        (JsonLinesCodec(), {"type": "ping"}, {"type": "pong"}, {"type": "data"}),
    ],
    ids=["lines", "length header", "JSON lines"],
)
@pytest.mark.parametrize("called", [False, True])
async def test_both_ask_and_answer(
    codec: Codec[Any],
    ping: Any,
    pong: Any,
    data: Any,
    called: bool,
    run: Run,
    autojump_clock: MockClock,
) -> None:
    """Two with a heartbeat each live for an hour of silence; neither's user sees anything of it,
    and no task is there for it. The messages are given as such or made by functions.
    """
    heartbeat: Heartbeat[Any] = Heartbeat(
        ping=(lambda: ping) if called else ping,
        is_ping=lambda message: message == ping,
        pong=(lambda asked: pong if asked == ping else None) if called else pong,
        is_pong=lambda message: message == pong,
        interval=30,
        timeout=90,
    )
    got: list[Any] = []
    async with no_leaks():
        left, right = (TcpConnection(trio.SocketStream(end)) for end in trio.socket.socketpair())
        async with trio.open_nursery() as nursery:
            tasks = living_tasks()
            for conn in (left, right):
                nursery.start_soon(quietly, run(conn, codec, heartbeat, got))
            await trio.sleep(3600)
            assert living_tasks() <= tasks + 4
            assert left.state is right.state is ConnectionState.CONNECTED
            assert got == []
            assert left.statistics().bytes_received >= 60
            left.send(codec.encode(data))
            await trio.testing.wait_all_tasks_blocked()
            assert got == [data]
            left.force_close()
        assert right.close_reason is not CloseReason.HEARTBEAT_TIMEOUT
        right.force_close()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("which", ["ping", "is_ping", "is_pong", "pong", "encode"])
async def test_functions_that_raise(
    which: str, run: Run, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """What a user's function raises ends that connection only, and is logged once."""

    def fails(*_: object) -> Any:
        raise RuntimeError("on purpose")

    functions: dict[str, Any] = {"ping": "ping", "pong": "pong", "is_ping": lambda m: m == "ping"}
    functions |= {"ping": "two\nlines"} if which == "encode" else {which: fails}
    heartbeat: Heartbeat[str] = Heartbeat(**functions, interval=30, timeout=90)

    async def handler(conn: TcpConnection) -> None:
        if len(server.connections) == 1:
            await run(conn, LINES, heartbeat, [])
        else:
            await trio.sleep_forever()

    server = local(handler)
    async with no_leaks(), serving(server) as address:
        with socket.create_connection(address) as first:
            await trio.testing.wait_all_tasks_blocked(0.05)
            with socket.create_connection(address):
                first.sendall(b"ping\n" if which in ("is_ping", "is_pong", "pong") else b"x\n")
                await trio.sleep(35)
                assert server.statistics().closed == {CloseReason.HANDLER_ERROR: 1}
                assert len(server.connections) == 1
    errors = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(errors) == 1


async def test_a_peer_that_nobody_reads_from(autojump_clock: MockClock) -> None:
    """Unread input is a sign of life: it is we who do not read."""
    conn, peer = pair()
    async with peer:
        channel = FramedChannel(conn, LINES, heartbeat=ASKS)
        await peer.send_all(b"data\n")
        await trio.sleep(500)
        assert await channel.receive() == "data"
        at = trio.current_time()
        await conn.wait_closed()
        assert at + 90 <= trio.current_time() < at + 91
        assert conn.close_reason is CloseReason.HEARTBEAT_TIMEOUT


async def test_a_peer_that_has_half_closed(autojump_clock: MockClock) -> None:
    """FAULTS 31: after its EOF nothing more is expected of it, nor is it asked, as long as it takes
    what we send; once it has been sent nothing for the timeout, it is given up.
    """
    conn, peer = pair()
    seen: list[tuple[float, bytes]] = []
    async with peer, trio.open_nursery() as nursery:
        nursery.start_soon(sent_to, peer, seen)
        channel = FramedChannel(conn, LINES, heartbeat=BOTH)
        await peer.send_all(b"request\n")
        await peer.send_eof()
        assert [line async for line in channel] == ["request"]
        for _ in range(10):
            await trio.sleep(85)
            await channel.send("part")
        await conn.wait_closed()
        assert (conn.close_reason, trio.current_time()) == (CloseReason.HEARTBEAT_TIMEOUT, 940)
    assert seen == [(85 * n, b"part\n") for n in range(1, 11)]


async def test_a_peer_that_has_half_closed_and_takes_nothing(autojump_clock: MockClock) -> None:
    """What stays queued is no sign of life: it is given up, timeout seconds after it took some."""
    conn, peer = pair()
    async with peer:
        channel = FramedChannel(conn, LINES, heartbeat=BOTH)
        await peer.send_eof()
        assert [line async for line in channel] == []
        await trio.sleep(50)
        while conn.send(bytes(65536)):
            pass
        for _ in range(9):
            await trio.sleep(9)
            conn.send(b"more")
        await conn.wait_closed()
        assert (conn.close_reason, trio.current_time()) == (CloseReason.HEARTBEAT_TIMEOUT, 140)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"pong": "pong"}, TypeError, r"Heartbeat\(pong=\.\.\.\): pass is_ping, too"),
        ({"is_pong": "pong"}, TypeError, r"Heartbeat\(is_pong='pong'\): pass a function"),
        ({"is_ping": b"ping"}, TypeError, r"Heartbeat\(is_ping=b'ping'\): pass a function"),
        ({"interval": 0}, ValueError, r"Heartbeat\(interval=0\): pass more than 0 seconds$"),
        ({"timeout": -1}, ValueError, r"Heartbeat\(timeout=-1\): pass more than 0 seconds$"),
        ({"interval": None}, TypeError, r"Heartbeat\(interval=None\): "),
        ({"timeout": None}, TypeError, r"Heartbeat\(timeout=None\): "),
        ({"interval": 30, "timeout": 30}, ValueError, r"pass a timeout of more than the interval"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    """What can never work is refused where it is written; and no text advises what is refused."""
    with pytest.raises(error, match=text) as caught:
        Heartbeat(**{"ping": "ping"} | options)
    assert "None for off" not in str(caught.value)


async def test_a_connection_that_was_quiet_before(autojump_clock: MockClock) -> None:
    """The heartbeat counts from its own beginning: before, nobody has asked."""
    conn, peer = pair()
    async with peer:
        conn.note_times()
        await trio.sleep(500)
        FramedChannel(conn, LINES, heartbeat=ASKS)
        await conn.wait_closed()
        assert (conn.close_reason, trio.current_time()) == (CloseReason.HEARTBEAT_TIMEOUT, 590)


async def test_pings_that_flood(autojump_clock: MockClock) -> None:
    """One that asks and takes no answers does not fill the memory, and its messages come."""
    conn, peer = pair()
    got: list[str] = []

    async def flood() -> None:
        for _ in range(200):
            await peer.send_all(b"ping\n" * 1000)
        await peer.send_all(b"data\n")

    async with peer, trio.open_nursery() as nursery:
        nursery.start_soon(quietly, by_channel(conn, LINES, BOTH, got))
        await flood()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert got == ["data"]
        assert conn.buffered <= 65536 + 65536
        conn.force_close()


@pytest.mark.parametrize("run", RUNS)
async def test_messages_before_a_break(run: Run, autojump_clock: MockClock) -> None:
    """A ping that can no longer be answered takes no message with it."""
    conn, peer = pair()
    got: list[str] = []
    await peer.send_all(b"ping\none\nping\ntwo\n")
    await peer.aclose()
    await quietly(run(conn, LINES, BOTH, got))
    assert got == ["one", "two"]
    conn.force_close()


async def test_asked_late(mock_clock: MockClock) -> None:
    """FAULTS 57: after the process was stopped for long the peer is asked before it is given up."""
    conn, peer = pair()
    async with peer, trio.open_nursery() as nursery:
        nursery.start_soon(quietly, by_channel(conn, LINES, BOTH, []))
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(1000)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert conn.state is ConnectionState.CONNECTED
        assert await peer.receive_some() == b"ping\n"
        mock_clock.jump(62)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert conn.close_reason is CloseReason.HEARTBEAT_TIMEOUT


@pytest.mark.parametrize("end", ["force_close", "aclose", "detach"])
async def test_nothing_is_left_for_the_collector(end: str, autojump_clock: MockClock) -> None:
    """At the end nothing is set any more, and connection and channel are freed at once."""
    gc.collect()
    gc.disable()
    try:
        keep, other = pair()
        conn, peer = pair()
        channel = FramedChannel(conn, LINES, heartbeat=BOTH)
        gone = weakref.ref(conn)
        await trio.sleep(31)
        assert len(current_poller().wheel) == 2
        if end == "aclose":
            await channel.aclose()
        elif end == "detach":
            conn.detach()[0].socket.close()
        else:
            conn.force_close()
        assert len(current_poller().wheel) == 0
        assert current_poller()._timers.next_deadline() is None
        del channel, conn
        await trio.sleep(0)
        assert gone() is None
        await peer.aclose()
        await other.aclose()
        keep.force_close()
    finally:
        gc.enable()


@asynccontextmanager
async def watched_peers(number: int) -> AsyncIterator[tuple[TcpServer, list[socket.socket]]]:
    """So many clients that have said something to a server with a heartbeat of a second."""
    heartbeat: Heartbeat[str] = Heartbeat(ping="ping", interval=0.4, timeout=1)
    server = local(lambda conn: by_channel(conn, LINES, heartbeat, []))
    async with no_leaks(), serving(server) as address:
        clients = [socket.create_connection(address) for _ in range(number)]
        while len(server.connections) < number:
            await trio.sleep(0.01)
        for client in clients:
            client.sendall(b"here\n")
        await trio.sleep(0.1)
        yield server, clients
        for client in clients:
            client.close()


async def seconds_until_gone(server: TcpServer) -> float:
    """How long it takes until the server has no connection any more."""
    begun = time.monotonic()
    with trio.fail_after(30):
        while server.connections:
            await trio.sleep(0.01)
    return time.monotonic() - begun


async def peers_that_vanish(number: int) -> float:
    """So many are cut off at once, with no FIN and no RST, in a network of their own that goes
    down; how many seconds later the last connection is gone.
    """
    async with watched_peers(number) as (server, _):
        ip("link", "set", "lo", "down")
        took = await seconds_until_gone(server)
        assert server.statistics().closed == {CloseReason.HEARTBEAT_TIMEOUT: number}
    return took


async def test_a_network_that_goes_down(own_network: None) -> None:
    """FAULTS 35: all are gone soon after the timeout, and their descriptors are back."""
    assert await peers_that_vanish(50) < 10


async def test_peers_that_vanish() -> None:
    """FAULTS 35, with peers whose kernel forgets them: it answers the ping with a reset."""
    async with watched_peers(50) as (server, clients):
        try:
            for client in clients:
                vanish(client)
        except PermissionError:
            server.close()
            pytest.skip("needs the right to TCP_REPAIR")
        assert await seconds_until_gone(server) < 10
        closed = server.statistics().closed
        assert set(closed) <= {CloseReason.HEARTBEAT_TIMEOUT, CloseReason.PEER_RESET}
        assert sum(closed.values()) == 50
