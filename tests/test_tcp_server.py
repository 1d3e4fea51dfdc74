"""TcpServer: a connection's trouble stays its own, the books always balance, every end is clean."""

from __future__ import annotations

import logging
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import (
    cancelled_after,
    connect,
    echo,
    living_tasks,
    no_leaks,
    open_descriptors,
    reset,
    serving,
    until,
)
from tests.servers import (
    Handler,
    ScriptedListener,
    assert_echoes,
    balanced,
    clients,
    closed,
    listens,
    local,
    rest_of,
    serve_and_keep,
    silent,
)
from trioreactor import (
    Acceptor,
    Callbacks,
    CloseReason,
    ConnectionState,
    Limits,
    ProtocolError,
    TcpConnection,
    TcpServer,
    Timeouts,
    Watermarks,
    open_unix_acceptor,
)

# -- making one


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((None, 0), {}, "async function"),
        ((echo,), {}, "either a port or listeners"),
        ((echo, 0), {"listeners": []}, "either a port or listeners"),
        ((echo,), {"listeners": [], "host": "127.0.0.1"}, "host belongs to port"),
    ],
)
def test_arguments_are_checked(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    """What cannot be meant is refused when the server is made, with what to pass instead."""
    with pytest.raises(TypeError, match=message):
        TcpServer(*args, **kwargs)


def test_can_be_made_outside_trio() -> None:
    """A server can be made, and looked at, before there is a trio run."""
    server = local(echo, name="early")
    assert server.addresses == []
    assert dict(server.connections) == {}
    assert server.statistics().opened == 0
    assert "early" in repr(server)


async def test_serves_once() -> None:
    """A server that has served refuses to serve again, also while it still does."""
    server = local(echo)
    async with no_leaks():
        async with serving(server):
            with pytest.raises(RuntimeError, match="another TcpServer"):
                await server.serve()
        with pytest.raises(RuntimeError, match="another TcpServer"):
            await server.serve()


async def test_an_end_that_comes_before_the_beginning() -> None:
    """After close() or drain(), serve() returns at once."""
    async with no_leaks():
        server = local(echo)
        server.close()
        with trio.fail_after(5):
            await server.serve()
        server = local(echo)
        report = await server.drain(10)
        assert (report.finished, report.forced, report.stuck) == (0, (), ())
        with trio.fail_after(5):
            await server.serve()


async def test_a_port_that_cannot_be_had() -> None:
    """The OSError of bind comes out of serve() plain, and nothing stays open."""
    async with no_leaks(), serving(local(echo)) as (host, port):
        with pytest.raises(OSError, match="in use"):
            await TcpServer(echo, port, host=host).serve()


# -- names and the registry


async def test_names_and_registry() -> None:
    """Each connection has a name of its own, {server}-{address}#{number}, and is found by it."""
    server = local(echo, name="chat")
    async with no_leaks(), serving(server) as (host, port), clients((host, port), 3) as streams:
        for stream in streams:
            await assert_echoes(stream)
        names = [f"chat-{host}:{port}#{n}" for n in (1, 2, 3)]
        assert list(server.connections) == names
        assert [conn.name for conn in server.connections.values()] == names
        assert [conn.peer_address for conn in server.connections.values()] == [
            stream.socket.getsockname() for stream in streams
        ]
        assert {conn.local_address for conn in server.connections.values()} == {(host, port)}
        await streams[1].aclose()
        await until(lambda: len(server.connections) == 2)
        assert names[1] not in server.connections
        # A number is never used again.
        async with clients((host, port), 1):
            await until(lambda: f"chat-{host}:{port}#4" in server.connections)


async def test_the_registry_is_read_only() -> None:
    """Nobody can put a connection in or out but the server."""
    server = local(echo)
    async with serving(server) as address, clients(address, 1):
        await until(lambda: server.connections)
        (name,) = server.connections
        with pytest.raises(TypeError):
            del server.connections[name]  # type: ignore[attr-defined]
        with pytest.raises(TypeError):
            server.connections["another"] = server.connections[name]  # type: ignore[index]


async def test_addresses_are_there_while_it_listens() -> None:
    """`addresses` is empty before and after."""
    server = local(echo)
    assert server.addresses == []
    async with serving(server) as address:
        assert server.addresses == [address]
        assert f"{address[0]}:{address[1]}" in repr(server)
    assert server.addresses == []
    assert "nothing" in repr(server)


async def test_all_interfaces() -> None:
    """Without a host it serves IPv4 and IPv6 on one port."""
    server = TcpServer(echo, 0)
    async with no_leaks(), trio.open_nursery() as nursery:
        acceptors = await nursery.start(server.serve)
        assert len({acceptor.address[1] for acceptor in acceptors}) == 1
        for acceptor in acceptors:
            async with await trio.testing.open_stream_to_socket_listener(acceptor) as client:
                await assert_echoes(client)
        server.close()


# -- what becomes of a connection


async def returns(conn: TcpConnection) -> None:
    conn.send(b"bye")


async def raises(conn: TcpConnection) -> None:
    await conn.receive_some()
    raise ValueError("a bug in the handler")


async def protocol_error(conn: TcpConnection) -> None:
    await conn.receive_some()
    raise ProtocolError("what the peer sent makes no sense")


async def forced(conn: TcpConnection) -> None:
    await conn.receive_some()
    conn.force_close()


async def forced_with_a_reason(conn: TcpConnection) -> None:
    await conn.receive_some()
    conn.force_close(CloseReason.IDLE_TIMEOUT)
    await trio.sleep_forever()


async def floods(conn: TcpConnection) -> None:
    while True:
        conn.send(bytes(65536))


async def stalls(conn: TcpConnection) -> None:
    while True:
        await conn.send_all(bytes(65536))


async def closes(conn: TcpConnection) -> None:
    await conn.receive_some()
    await conn.aclose()


async def hands_over(conn: TcpConnection) -> None:
    stream, _ = conn.detach()
    await trio.aclose_forcefully(stream)


@pytest.mark.parametrize(
    ("handler", "act", "reason"),
    [
        (returns, None, CloseReason.LOCAL_CLOSE),
        (closes, "send", CloseReason.LOCAL_CLOSE),
        (hands_over, None, CloseReason.LOCAL_CLOSE),
        (echo, "close", CloseReason.PEER_EOF),
        (echo, "reset", CloseReason.PEER_RESET),
        (raises, "send", CloseReason.HANDLER_ERROR),
        (protocol_error, "send", CloseReason.PROTOCOL_ERROR),
        (forced, "send", CloseReason.FORCED),
        (forced_with_a_reason, "send", CloseReason.IDLE_TIMEOUT),
        (floods, None, CloseReason.SLOW_CONSUMER),
        (stalls, None, CloseReason.WRITE_STALLED),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_close_reasons(handler: Handler, act: str | None, reason: CloseReason) -> None:
    """Every way to end has its reason, the books balance, and nothing is left behind (C, F, T)."""
    server = local(
        handler,
        timeouts=Timeouts(write_stall=0.1),
        watermarks=Watermarks(limit=1 << 20) if handler is floods else Watermarks(),
    )
    async with no_leaks(), serving(server) as address, clients(address, 1) as (client,):
        await until(lambda: server.statistics().opened)
        if act == "send":
            await client.send_all(b"x")
        elif act == "close":
            await client.aclose()
        elif act == "reset":
            reset(client.socket)
        await until(lambda: not server.connections)
        assert closed(server) == {reason: 1}


async def test_a_handler_that_returns_closes_gracefully() -> None:
    """All that was sent arrives, then EOF, though the client's own words were never read."""
    size = 1 << 20

    async def handler(conn: TcpConnection) -> None:
        await conn.send_all(bytes(size))

    server = local(handler)
    async with no_leaks(), serving(server) as address, clients(address, 1) as (client,):
        await client.send_all(b"nobody reads this")
        received = b""
        async for chunk in client:
            received += chunk
        assert len(received) == size
        await client.aclose()
        await until(lambda: not server.connections)
    assert closed(server) == {CloseReason.LOCAL_CLOSE: 1}


async def test_one_bad_connection_leaves_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    """One handler raises, one peer resets, one is garbage; the others talk on (FAULTS 36, O)."""

    async def handler(conn: TcpConnection) -> None:
        async for chunk in conn:
            if chunk == b"raise":
                raise ValueError("a bug in the handler")
            await conn.send_all(chunk)

    server = local(handler)
    async with no_leaks(), serving(server) as address, clients(address, 10) as streams:
        for stream in streams:
            await assert_echoes(stream)
        await streams[0].send_all(b"raise")
        reset(streams[1].socket)
        await streams[2].aclose()
        assert await rest_of(streams[0]) == b""
        await until(lambda: len(server.connections) == 7)
        for stream in streams[3:]:
            await assert_echoes(stream)
        async with clients(address, 1) as (newcomer,):
            await assert_echoes(newcomer)
            assert closed(server) == {
                CloseReason.HANDLER_ERROR: 1,
                CloseReason.PEER_RESET: 1,
                CloseReason.PEER_EOF: 1,
            }
    # The bug is told once, with its traceback; the two that left are nothing to tell.
    (record,) = [r for r in caplog.records if r.levelno >= logging.INFO]
    assert record.name == "trioreactor.server"
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)
    assert "in handler" in caplog.text
    assert "#1: the handler raised" in record.getMessage()


async def test_a_callback_that_raises_is_no_other() -> None:
    """The same holds for a handler made of callbacks."""

    def message(conn: TcpConnection, buffer: Any) -> None:
        if buffer.take() == b"raise":
            raise ValueError("a bug in the callback")
        conn.send(b"fine")

    server = local(Callbacks(message=message))
    async with no_leaks(), serving(server) as address, clients(address, 2) as (bad, good):
        await bad.send_all(b"raise")
        assert await rest_of(bad) == b""
        await good.send_all(b"x")
        assert await good.receive_some() == b"fine"
        assert closed(server) == {CloseReason.HANDLER_ERROR: 1}


async def test_a_group_of_errors_is_one_error(caplog: pytest.LogCaptureFixture) -> None:
    """What a handler's own nursery raises is logged once, as the group that it is."""

    async def fail(error: Exception) -> None:
        raise error

    async def handler(conn: TcpConnection) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, ValueError("one"))
            nursery.start_soon(fail, OSError("two"))

    server = local(handler)
    async with no_leaks(), serving(server) as address, clients(address, 1) as (client,):
        assert await rest_of(client) == b""
        await until(lambda: not server.connections)
        assert closed(server) == {CloseReason.HANDLER_ERROR: 1}
    (record,) = [r for r in caplog.records if r.levelno >= logging.INFO]
    assert record.exc_info is not None
    group = record.exc_info[1]
    assert isinstance(group, ExceptionGroup)
    assert {str(error) for error in group.exceptions} == {"one", "two"}


async def test_a_peer_that_left_is_no_error_in_a_group_either(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A reader and a writer task that both find the connection broken are not worth a line."""

    async def write(conn: TcpConnection) -> None:
        while True:
            await conn.send_all(bytes(1000))
            await trio.sleep(0)

    async def handler(conn: TcpConnection) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, conn)
            nursery.start_soon(echo, conn)

    server = local(handler)
    async with no_leaks(), serving(server) as address, clients(address, 1) as (client,):
        await client.receive_some()
        reset(client.socket)
        await until(lambda: not server.connections)
        assert closed(server) == {CloseReason.PEER_RESET: 1}
    assert not [r for r in caplog.records if r.levelno >= logging.INFO]


async def test_another_resource_that_breaks_is_the_handlers_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """BrokenResourceError of something else than this connection is an error like any other."""

    async def handler(conn: TcpConnection) -> None:
        await conn.receive_some()
        raise trio.BrokenResourceError("the database went away")

    server = local(handler)
    async with no_leaks(), serving(server) as address, clients(address, 1) as (client,):
        await client.send_all(b"x")
        assert await rest_of(client) == b""
        await until(lambda: not server.connections)
        assert closed(server) == {CloseReason.HANDLER_ERROR: 1}
    assert "the database went away" in caplog.text


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, BaseException])
async def test_what_is_no_exception_passes(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """KeyboardInterrupt and its like come out of serve() as they are, and everything is closed."""

    async def handler(conn: TcpConnection) -> None:
        async for _ in conn:
            raise kind("out")

    server = local(handler)
    outcomes: list[BaseException | None] = []
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(serve_and_keep, server, outcomes)
        async with clients(acceptor.address, 3) as streams:
            await streams[0].send_all(b"x")
            for stream in streams:
                assert await rest_of(stream) == b""
    (error,) = outcomes
    assert type(error) is kind
    assert sum(closed(server).values()) == 3
    assert not caplog.records


async def test_a_mixed_group_is_taken_apart(caplog: pytest.LogCaptureFixture) -> None:
    """Of a group, errors are logged and only what is no Exception passes, without its wrapping."""

    async def handler(conn: TcpConnection) -> None:
        await conn.receive_some()
        raise BaseExceptionGroup(
            "mixed", [ValueError("a bug"), BaseExceptionGroup("inner", [KeyboardInterrupt()])]
        )

    server = local(handler)
    outcomes: list[BaseException | None] = []
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(serve_and_keep, server, outcomes)
        async with clients(acceptor.address, 1) as (client,):
            await client.send_all(b"x")
            await rest_of(client)
    assert type(outcomes[0]) is KeyboardInterrupt
    assert closed(server) == {CloseReason.HANDLER_ERROR: 1}
    (record,) = caplog.records
    assert record.name == "trioreactor.server"
    assert "a bug" in caplog.text


async def test_a_handlers_own_nursery_is_cancelled_quietly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """force_close cancels what a handler started, and no error comes of it."""
    cancelled = []

    async def sleep() -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.append(True)

    async def handler(conn: TcpConnection) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(sleep)

    server = local(handler)
    async with no_leaks(), serving(server) as address, clients(address, 1):
        await until(lambda: server.connections)
        (conn,) = server.connections.values()
        await trio.testing.wait_all_tasks_blocked()
        conn.force_close()
        await until(lambda: not server.connections)
        assert closed(server) == {CloseReason.FORCED: 1}
    assert cancelled == [True] * 3
    assert not [r for r in caplog.records if r.levelno >= logging.INFO]


# -- the books


async def test_statistics_count_what_happened() -> None:
    """Bytes both ways, marks crossed and bytes queued, of the living and of the dead."""
    size = 8 << 20

    async def handler(conn: TcpConnection) -> None:
        async for chunk in conn:
            await conn.send_all(chunk)
            if chunk.endswith(b"flood"):
                conn.send(bytes(size))

    server = local(handler, timeouts=Timeouts(linger=None))
    async with no_leaks(), serving(server) as address, clients(address, 2) as (a, b):
        await assert_echoes(a, b"x" * 1000)
        await a.aclose()
        await until(lambda: len(server.connections) == 1)
        await b.send_all(b"flood")
        await until(lambda: server.statistics().pauses)
        now = server.statistics()
        assert (now.opened, now.active, now.rejected, now.shed) == (2, 1, {}, 0)
        assert now.bytes_received == 1005
        assert now.bytes_sent + now.buffered == 1005 + size
        assert now.buffered > 0
        assert (now.pauses, now.resumes) == (1, 0)
        left = 5 + size
        while left:
            left -= len(await b.receive_some())
        await b.aclose()
        await until(lambda: not server.connections)
        after = server.statistics()
        assert (after.bytes_received, after.bytes_sent) == (1005, 1005 + size)
        assert (after.pauses, after.resumes, after.buffered) == (1, 1, 0)
        # What was given before has not changed, and cannot be.
        assert (now.closed, now.pauses) == ({CloseReason.PEER_EOF: 1}, 1)
        with pytest.raises(TypeError):
            now.closed[CloseReason.FORCED] = 1  # type: ignore[index]


class Ledger(trio.abc.Instrument):
    """Checks promise C after every single step of every task."""

    def __init__(self, server: TcpServer) -> None:
        self._server = server
        self.steps = 0
        self.wrong: list[str] = []

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1
        if not balanced(self._server):
            self.wrong.append(f"after {task}: {self._server.statistics()}")


ACTS = st.tuples(
    st.sampled_from(
        [
            "connect",
            "connect",
            "connect",
            "talk",
            "raise",
            "return",
            "flood",
            "close",
            "reset",
            "force_close",
            "force_close_after",
            "broadcast",
            "stop",
            "resume",
            "limit",
            "no_limit",
            "wait",
        ]
    ),
    st.integers(min_value=0, max_value=20),
)


@settings(max_examples=25, deadline=None)
@given(acts=st.lists(ACTS, min_size=5, max_size=40))
async def test_the_books_always_balance(acts: list[tuple[str, int]]) -> None:
    """Whatever clients and server do, opened - closed == len(connections) at every step (C)."""
    seen: list[TcpConnection] = []

    async def handler(conn: TcpConnection) -> None:
        seen.append(conn)
        async for chunk in conn:
            if b"raise" in chunk:
                raise ValueError("a bug in the handler")
            if b"return" in chunk:
                return
            while b"flood" in chunk:
                conn.send(bytes(65536))
            await conn.send_all(chunk)

    server = local(handler, watermarks=Watermarks(limit=1 << 20), timeouts=Timeouts(linger=0.01))
    ledger = Ledger(server)
    streams: list[trio.SocketStream] = []
    trio.lowlevel.add_instrument(ledger)
    try:
        async with no_leaks(), serving(server) as address:
            for act, n in acts:
                await _perform(act, n, server, address, streams)
            server.limits = Limits()
            server.resume_accepting()
            for stream in streams:
                await trio.aclose_forcefully(stream)
            await until(lambda: not server.connections)
    finally:
        trio.lowlevel.remove_instrument(ledger)
    assert ledger.wrong == []
    assert ledger.steps > 0
    assert all(conn.close_reason is not None for conn in seen)
    assert sum(closed(server).values()) == len(seen) == server.statistics().opened


async def _perform(
    act: str, n: int, server: TcpServer, address: Any, streams: list[trio.SocketStream]
) -> None:
    living = list(server.connections.values())
    if act == "connect":
        streams.append(connect(address))
    elif act in ("talk", "raise", "return", "flood") and streams:
        # Its connection may be gone, or the server may not read it yet.
        with trio.move_on_after(0.01):
            with suppress(trio.BrokenResourceError):
                await streams[n % len(streams)].send_all(act.encode())
    elif act == "close" and streams:
        await streams.pop(n % len(streams)).aclose()
    elif act == "reset" and streams:
        reset(streams.pop(n % len(streams)).socket)
    elif act == "force_close" and living:
        living[n % len(living)].force_close(reset=n % 2 == 0)
    elif act == "force_close_after" and living:
        living[n % len(living)].force_close_after(n / 1000)
    elif act == "broadcast":
        assert server.broadcast(bytes(100 * n)) <= len(living)
    elif act == "stop":
        server.stop_accepting()
    elif act == "resume":
        server.resume_accepting()
    elif act == "limit":
        server.limits = Limits(
            connections=1 + n % 4, per_peer=1 + n % 3, when_full="reject" if n % 2 else "wait"
        )
    elif act == "no_limit":
        server.limits = Limits()
    elif act == "wait":
        for _ in range(n):
            await trio.lowlevel.checkpoint()


# -- broadcast


async def test_broadcast_reaches_all() -> None:
    """Every connection gets it, and the answer is how many."""
    server = local(silent)
    async with no_leaks(), serving(server) as address, clients(address, 5) as streams:
        await until(lambda: len(server.connections) == 5)
        message = bytearray(b"hello")
        assert server.broadcast(message) == 5
        message[:] = b"wrong"
        for stream in streams:
            assert await stream.receive_some() == b"hello"
        assert server.broadcast(b"") == 5
        server.close()
        assert server.broadcast(b"too late") == 0


async def test_broadcast_to_some() -> None:
    """`to` chooses whom."""
    server = local(silent)
    async with no_leaks(), serving(server) as address, clients(address, 3) as streams:
        await until(lambda: len(server.connections) == 3)
        some = (conn for conn in server.connections.values() if not conn.name.endswith("#2"))
        assert server.broadcast(b"hello", to=some) == 2
        assert server.broadcast(b"all") == 3
        for stream, expected in zip(streams, [b"helloall", b"all", b"helloall"], strict=True):
            received = b""
            while len(received) < len(expected):
                received += await stream.receive_some()
            assert received == expected


async def test_broadcast_leaves_closing_ones_out() -> None:
    """Closed, closing and broken connections are not counted and cost nobody anything."""
    server = local(silent)
    async with no_leaks(), serving(server) as address, clients(address, 5) as streams:
        await until(lambda: len(server.connections) == 5)
        closing, gone, detached, *_ = server.connections.values()
        closing.shutdown()
        gone.force_close()
        with trio.CancelScope() as scope:
            scope.cancel()
            await detached.aclose()
        living = [conn for conn in server.connections.values() if conn not in (gone, detached)]
        assert server.broadcast(b"hello", to=[gone, detached, *living]) == 2
        assert await streams[0].receive_some() == b""
        for stream in streams[3:]:
            assert await stream.receive_some() == b"hello"


async def test_broadcast_leaves_out_who_streams() -> None:
    """A connection that streams more than its buffer holds is not torn apart by a broadcast (B)."""
    size = 8 << 20

    async def handler(conn: TcpConnection) -> None:
        await conn.send_all(bytes(size))

    server = local(handler, watermarks=Watermarks(limit=65536, high=65536))
    async with no_leaks(), serving(server) as address, clients(address, 1) as (client,):
        await until(lambda: server.statistics().bytes_sent)
        assert server.broadcast(b"x" * 100) == 0
        assert await rest_of(client) == bytes(size)


async def test_broadcast_is_not_delayed_by_a_stuck_one() -> None:
    """Who never reads loses its connection at the limit; the others miss nothing (FAULTS 26)."""
    rounds, message = 3000, bytes(4096)
    server = local(listens, watermarks=Watermarks(high=65536, limit=1 << 18))
    received = [0, 0, 0]

    async def read(n: int, stream: trio.SocketStream) -> None:
        async for chunk in stream:
            received[n] += len(chunk)

    async with no_leaks(), serving(server) as address, clients(address, 4) as streams:
        await until(lambda: len(server.connections) == 4)
        stuck = server.connections[f"server-{address[0]}:{address[1]}#4"]
        counts = []
        async with trio.open_nursery() as nursery:
            for n, stream in enumerate(streams[:3]):
                nursery.start_soon(read, n, stream)
            for _ in range(rounds):
                counts.append(server.broadcast(message))
                await trio.lowlevel.checkpoint()
                # As a sender would that heeds its own answers: the healthy ones keep up.
                while any(
                    conn.statistics().buffered > 65536
                    for conn in server.connections.values()
                    if conn is not stuck
                ):
                    await trio.lowlevel.checkpoint()
            await until(lambda: received == [rounds * len(message)] * 3)
            nursery.cancel_scope.cancel()
        assert counts == sorted(counts, reverse=True)
        assert (counts[0], counts[-1]) == (4, 3)
        assert stuck.close_reason is CloseReason.SLOW_CONSUMER
        await until(lambda: len(server.connections) == 3)
        assert closed(server) == {CloseReason.SLOW_CONSUMER: 1}


# -- stop and resume


async def test_stop_accepting_leaves_newcomers_waiting() -> None:
    """While stopped, newcomers wait in the backlog and those who are there are served."""
    server = local(echo)
    async with no_leaks(), serving(server) as address, clients(address, 1) as (old,):
        await assert_echoes(old)
        server.stop_accepting()
        server.stop_accepting()
        async with clients(address, 1) as (new,):
            await new.send_all(b"hello")
            for _ in range(20):
                await assert_echoes(old)
            assert server.statistics().opened == 1
            server.resume_accepting()
            server.resume_accepting()
            with trio.fail_after(10):
                assert await new.receive_some() == b"hello"


# -- close


async def test_close_ends_everything_at_once() -> None:
    """Connections are closed and handlers cancelled; serve() returns; closing again is nothing."""
    server = local(silent)
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        async with clients(acceptor.address, 3) as streams:
            await until(lambda: len(server.connections) == 3)
            server.close()
            server.close()
            assert server.addresses == []
            for stream in streams:
                assert await rest_of(stream) == b""
        with pytest.raises(ConnectionRefusedError):
            connect(acceptor.address)
    assert closed(server) == {CloseReason.FORCED: 3}
    server.close()


async def test_close_from_a_handler() -> None:
    """A handler may end its own server."""

    async def handler(conn: TcpConnection) -> None:
        await conn.receive_some()
        server.close()

    server = local(handler)
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        async with clients(acceptor.address, 3) as streams:
            await until(lambda: len(server.connections) == 3)
            await streams[1].send_all(b"x")
            for stream in streams:
                assert await rest_of(stream) == b""
    assert closed(server) == {CloseReason.FORCED: 3}


async def test_close_from_a_callback() -> None:
    """So may a callback."""

    def message(conn: TcpConnection, buffer: Any) -> None:
        server.close()

    server = local(Callbacks(message=message))
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        async with clients(acceptor.address, 3) as streams:
            await until(lambda: len(server.connections) == 3)
            await streams[1].send_all(b"x")
            for stream in streams:
                assert await rest_of(stream) == b""
    assert closed(server) == {CloseReason.FORCED: 3}


async def test_close_reaches_a_handler_that_has_not_started() -> None:
    """A connection whose task has not run yet when the server closes is cancelled, too (T)."""

    async def handler(conn: TcpConnection) -> None:
        # The first of the two to run ends the server before the other's first step.
        if server.addresses:
            server.close()
        await trio.sleep_forever()

    server = local(handler)
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        server.stop_accepting()
        async with clients(acceptor.address, 2):
            server.resume_accepting()
            await until(lambda: closed(server) == {CloseReason.FORCED: 2})


@pytest.mark.parametrize("end", ["close", "drain"])
async def test_the_end_wakes_acceptors_that_wait_for_room(end: str) -> None:
    """With several listening sockets at one full limit, none is forgotten when the server ends."""
    async with no_leaks():
        acceptors = [Acceptor(ScriptedListener()) for _ in range(3)]
        server = TcpServer(echo, listeners=acceptors, limits=Limits(connections=1))
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve)
                async with (
                    clients(acceptors[0].address, 2),
                    clients(acceptors[1].address, 1),
                    clients(acceptors[2].address, 1),
                ):
                    await until(lambda: server.connections)
                    await trio.testing.wait_all_tasks_blocked()
                    if end == "close":
                        server.close()
                    else:
                        assert len((await server.drain(0)).forced) == 1
    assert balanced(server)


@pytest.mark.parametrize("end", ["close", "drain"])
async def test_the_end_does_not_wait_for_the_accept_rate(
    end: str, autojump_clock: trio.testing.MockClock
) -> None:
    """A server that may accept again in an hour ends now."""
    server = local(echo, limits=Limits(accept_rate=1 / 3600))
    begun = trio.current_time()
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        async with clients(acceptor.address, 2):
            await until(lambda: server.connections)
            await trio.testing.wait_all_tasks_blocked()
            if end == "close":
                server.close()
            else:
                await server.drain(0)
    assert trio.current_time() - begun < 1


# -- cancellation


@pytest.mark.parametrize("own", [False, True], ids=["port", "listeners"])
async def test_serve_cancelled_at_every_point(own: bool) -> None:
    """Wherever serve() is cancelled, all is closed and the books balance (C, F, T)."""
    outcomes: set[CloseReason] = set()
    async with no_leaks():
        for turns in range(30):
            if own:
                server = await _cancel_a_busy_server(turns)
                outcomes |= set(closed(server))
            else:
                server = local(echo)
                assert await cancelled_after(turns, server.serve)
            assert dict(server.connections) == {}
            assert server.addresses == []
            assert balanced(server)
    if own:
        assert outcomes >= {CloseReason.CANCELLED, CloseReason.HANDLER_ERROR, CloseReason.PEER_EOF}


async def _cancel_a_busy_server(turns: int) -> TcpServer:
    async def handler(conn: TcpConnection) -> None:
        async for chunk in conn:
            if chunk == b"raise":
                raise ValueError("a bug in the handler")
            await conn.send_all(chunk)

    acceptor = Acceptor(ScriptedListener(), batch=1)
    server = TcpServer(handler, listeners=[acceptor])
    async with clients(acceptor.address, 5) as streams:
        await streams[0].send_all(b"raise")
        await streams[1].send_all(b"hello")
        await streams[2].aclose()
        assert await cancelled_after(turns, server.serve)
        for stream in streams[3:]:
            await rest_of(stream)
    return server


async def test_a_cancelled_server_closes_its_connections() -> None:
    """Leaving serve() by cancellation closes every connection with CANCELLED."""
    server = local(echo)
    async with no_leaks():
        async with trio.open_nursery() as nursery:
            (acceptor,) = await nursery.start(server.serve)
            async with clients(acceptor.address, 3) as streams:
                for stream in streams:
                    await assert_echoes(stream)
                nursery.cancel_scope.cancel()
        assert closed(server) == {CloseReason.CANCELLED: 3}


async def test_nothing_runs_on_after_serve() -> None:
    """When serve() has returned, or was cancelled, descriptors and tasks are what they were: at
    once, not soon (F, T)."""
    before = open_descriptors(), living_tasks()
    with trio.move_on_after(0.05) as scope:
        await local(echo).serve()
    assert (open_descriptors(), living_tasks()) == before
    assert scope.cancelled_caught

    async def come() -> None:
        await until(lambda: server.addresses)
        with connect(server.addresses[0]).socket:
            await until(lambda: server.connections)
            server.close()

    server = local(silent)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(come)
        await server.serve()
        assert (open_descriptors(), living_tasks()) == before
    assert closed(server) == {CloseReason.FORCED: 1}


async def test_a_handler_may_clean_up_when_cancelled() -> None:
    """A handler's own shielded last words get through when serve() is cancelled."""

    async def handler(conn: TcpConnection) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await conn.send_all(b"bye")
                await conn.aclose()

    server = local(handler)
    async with no_leaks(), trio.open_nursery() as outer:

        async def serve(*, task_status: trio.TaskStatus[list[Acceptor]]) -> None:
            async with trio.open_nursery() as nursery:
                task_status.started(await nursery.start(server.serve))
                await stop.wait()
                nursery.cancel_scope.cancel()

        stop = trio.Event()
        (acceptor,) = await outer.start(serve)
        async with clients(acceptor.address, 1) as (client,):
            await until(lambda: server.connections)
            await trio.testing.wait_all_tasks_blocked()
            stop.set()
            assert await rest_of(client) == b"bye"


# -- where handlers run, where it listens


async def test_handler_nursery_outlives_serve() -> None:
    """Handlers run in the nursery that was given, and go on when serve() has been cancelled."""
    server = local(echo)
    async with no_leaks(), trio.open_nursery() as handlers:
        async with trio.open_nursery() as nursery:

            async def serve(*, task_status: trio.TaskStatus[list[Acceptor]]) -> None:
                await server.serve(handler_nursery=handlers, task_status=task_status)

            (acceptor,) = await nursery.start(serve)
            streams = [connect(acceptor.address) for _ in range(2)]
            for stream in streams:
                await assert_echoes(stream)
            assert {task.name for task in handlers.child_tasks} == set(server.connections)
            nursery.cancel_scope.cancel()
        assert server.addresses == []
        for stream in streams:
            await assert_echoes(stream)
        assert balanced(server)
        await streams[0].aclose()
        await until(lambda: closed(server) == {CloseReason.PEER_EOF: 1})
        streams[1].socket.close()
        handlers.cancel_scope.cancel()
    assert closed(server) == {CloseReason.PEER_EOF: 1, CloseReason.CANCELLED: 1}


async def test_errors_in_a_handler_nursery_stay_inside() -> None:
    """A handler that raises does not end the user's nursery."""
    server = local(raises)
    async with no_leaks(), trio.open_nursery() as handlers, trio.open_nursery() as nursery:

        async def serve(*, task_status: trio.TaskStatus[list[Acceptor]]) -> None:
            await server.serve(handler_nursery=handlers, task_status=task_status)

        (acceptor,) = await nursery.start(serve)
        async with clients(acceptor.address, 1) as (client,):
            await client.send_all(b"x")
            assert await rest_of(client) == b""
        assert not handlers.cancel_scope.cancel_called
        await server.drain(0)


async def test_a_handler_nursery_that_is_closed() -> None:
    """A nursery that takes no more tasks is the caller's error, and nothing leaks (C, F)."""
    server = local(echo)
    async with no_leaks():
        async with trio.open_nursery() as handlers:
            pass
        outcomes = []

        async def serve(*, task_status: trio.TaskStatus[list[Acceptor]]) -> None:
            with pytest.raises(RuntimeError, match="closed to new arrivals") as caught:
                await server.serve(handler_nursery=handlers, task_status=task_status)
            outcomes.append(caught.value)

        async with trio.open_nursery() as nursery:
            (acceptor,) = await nursery.start(serve)
            async with clients(acceptor.address, 1) as (client,):
                assert await rest_of(client) == b""
    assert len(outcomes) == 1
    assert closed(server) == {CloseReason.CANCELLED: 1}


async def test_listeners_of_both_kinds() -> None:
    """It serves on acceptors and on trio's own listeners, and closes both."""
    async with no_leaks():
        theirs = await trio.open_tcp_listeners(0, host="127.0.0.1")
        ours = Acceptor(ScriptedListener())
        server = TcpServer(echo, listeners=[ours, *theirs])
        async with trio.open_nursery() as nursery:
            acceptors = await nursery.start(server.serve)
            assert acceptors[0] is ours
            assert acceptors[1].socket is theirs[0].socket
            assert server.addresses == [ours.address, theirs[0].socket.getsockname()]
            for address in server.addresses:
                async with clients(address, 1) as (client,):
                    await assert_echoes(client)
            server.close()
        assert theirs[0].socket.fileno() == -1


async def test_several_listeners_share_one_registry() -> None:
    """Connections of all listeners are numbered together and counted together."""
    async with no_leaks():
        acceptors = [Acceptor(ScriptedListener()) for _ in range(3)]
        server = TcpServer(echo, listeners=acceptors)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            streams = [connect(acceptor.address) for acceptor in acceptors * 2]
            for stream in streams:
                await assert_echoes(stream)
            numbers = sorted(int(name.rpartition("#")[2]) for name in server.connections)
            assert numbers == [1, 2, 3, 4, 5, 6]
            assert server.broadcast(b"hello") == 6
            server.close()
        for stream in streams:
            await stream.aclose()
    assert closed(server) == {CloseReason.FORCED: 6}


async def test_serves_unix_sockets(tmp_path: Any) -> None:
    """On a Unix socket the same server serves, with the path in the names."""
    path = str(tmp_path / "socket")
    async with no_leaks():
        acceptor = await open_unix_acceptor(path)
        server = TcpServer(echo, listeners=[acceptor], limits=Limits(per_peer=1))
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            # Peers of a Unix socket have no address, so no limit per peer applies.
            streams = [await trio.open_unix_socket(path) for _ in range(3)]
            for stream in streams:
                await assert_echoes(stream)
            assert f"server-{path}#3" in server.connections
            for stream in streams:
                await stream.aclose()
            server.close()
    assert server.statistics().rejected == {}


async def test_connections_are_up_in_order() -> None:
    """A connection is in the registry, CONNECTED and named before its handler's first line."""
    states = []

    async def handler(conn: TcpConnection) -> None:
        states.append((conn.name, conn.state, server.connections[conn.name] is conn))

    server = local(handler)
    async with no_leaks(), serving(server) as address, clients(address, 5):
        await until(lambda: len(states) == 5)
        await until(lambda: not server.connections)
    assert all(state is ConnectionState.CONNECTED and there for _, state, there in states)
    numbers = sorted(int(name.rpartition("#")[2]) for name, _, _ in states)
    assert all(b - a == 1 for a, b in pairwise(numbers))
