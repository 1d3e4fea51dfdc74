"""ServerLoops: a server whose connections live in several loops keeps every promise of one loop."""

from __future__ import annotations

import contextvars
import errno
import logging
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from tests.conftest import connect, everything, no_leaks, reset, until
from tests.servers import balanced, local, rest_of, serve_and_keep
from tests.test_loop_watchdog import watching_threads
from trioreactor import (
    Buffer,
    Callbacks,
    CloseReason,
    EventLoop,
    EventLoopThreadPool,
    Limits,
    SocketAddress,
    SocketOptions,
    TcpConnection,
    TcpServer,
    Timeouts,
    Watermarks,
)


async def echo(conn: TcpConnection) -> None:
    """Send back what comes."""
    async for chunk in conn:
        await conn.send_all(chunk)


def echo_message(conn: TcpConnection, buffer: Buffer) -> None:
    """The same, as a callback."""
    conn.send(buffer.take())


either_mode = pytest.mark.parametrize(
    "handler", [echo, Callbacks(message=echo_message)], ids=["coroutine", "dispatch"]
)


async def tasks() -> int:
    """How many the loop has that it runs in."""
    await trio.lowlevel.checkpoint()
    return trio.lowlevel.current_statistics().tasks_living


@asynccontextmanager
async def pooled(handler: Any, size: int = 2, **options: Any) -> AsyncIterator[TcpServer]:
    """A server on loopback whose connections are in so many loops; closed at the end, without a
    trace in any of the threads.
    """
    choose = options.pop("choose", "round_robin")
    async with no_leaks(), EventLoopThreadPool(size, choose=choose) as pool, no_leaks():
        before = [await pool.run(loop, tasks) for loop in pool.loops]
        server = local(handler, loops=pool, **options)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve)
                yield server
                server.close()
        assert not server.connections
        assert balanced(server)
        assert [await pool.run(loop, tasks) for loop in pool.loops] == before
        # Every permit was given back, and every loop's load.
        assert server.limits == options.get("limits", Limits())
        assert {pool.take_loop("") for _ in pool.loops} == set(pool.loops)


async def answer(client: trio.SocketStream, data: bytes = b"hello") -> None:
    """*client* is served."""
    with trio.fail_after(10):
        await client.send_all(data)
        got = b""
        while len(got) < len(data):
            chunk = await client.receive_some()
            assert chunk
            got += chunk
    assert got == data


async def answered(server: TcpServer, count: int, **options: Any) -> list[trio.SocketStream]:
    """So many clients, each of which has been answered."""
    streams = [connect(server.addresses[0], **options) for _ in range(count)]
    for stream in streams:
        await answer(stream)
    return streams


def close_all(streams: list[trio.SocketStream]) -> None:
    """With no checkpoint."""
    for stream in streams:
        stream.socket.close()


def by_loop(server: TcpServer) -> Counter[EventLoop]:
    """How many connections each loop has."""
    return Counter(conn.loop for conn in server.connections.values())


# -- serving


@either_mode
async def test_a_storm_of_connections(handler: Any) -> None:
    """Bytes, descriptors, tasks and counts are right over three loops, each of which has its share,
    while connections come all at once and end in every way.
    """
    async with pooled(handler, 3) as server:

        async def client(number: int) -> None:
            stream = connect(server.addresses[0], source=f"127.0.0.{1 + number % 5}")
            data = random.Random(number).randbytes(1 + number * 331 % 70_000)
            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.send_all, data)
                    got = bytearray()
                    while len(got) < len(data):
                        chunk = await stream.receive_some()
                        assert chunk
                        got += chunk
            assert got == data
            if number % 3 == 0:
                reset(stream.socket)
            elif number % 3 == 1:
                await stream.send_eof()
                assert await everything(stream) == b""
            stream.socket.close()

        async with trio.open_nursery() as nursery:
            for number in range(150):
                nursery.start_soon(client, number)
        await until(lambda: not server.connections)
        now = server.statistics()
        assert (now.opened, sum(now.closed.values()), now.active) == (150, 150, 0)
        assert now.bytes_received == now.bytes_sent > 150


@either_mode
async def test_a_connection_lives_in_one_loop(handler: Any) -> None:
    """Each in turn gets one; handler and callbacks run in its thread and nowhere else."""
    threads: dict[str, set[str]] = defaultdict(set)

    def note(conn: TcpConnection) -> None:
        assert conn.loop.in_loop
        threads[conn.name].add(threading.current_thread().name)

    def message(conn: TcpConnection, buffer: Buffer) -> None:
        note(conn)
        conn.send(buffer.take())

    async def coroutine(conn: TcpConnection) -> None:
        async for chunk in conn:
            note(conn)
            await conn.send_all(chunk)

    handler = (
        Callbacks(message=message, connection=note, write_complete=note)
        if isinstance(handler, Callbacks)
        else coroutine
    )
    async with pooled(handler) as server:
        streams = await answered(server, 6)
        for stream in streams:
            await answer(stream)
        assert sorted(by_loop(server).values()) == [3, 3]
        assert Counter(name for names in threads.values() for name in names) == {
            "loop-0": 3,
            "loop-1": 3,
        }
        assert not any(conn.loop.in_loop for conn in server.connections.values())
        close_all(streams)


@pytest.mark.parametrize("mode", ["coroutine", "dispatch"])
async def test_handlers_have_the_servers_context(mode: str) -> None:
    """Context variables are as `serve` found them, and each connection has its own copy."""
    variable: contextvars.ContextVar[bytes] = contextvars.ContextVar("variable")

    def message(conn: TcpConnection, buffer: Buffer) -> None:
        buffer.take()
        conn.send(variable.get())
        variable.set(b"changed")

    async def coroutine(conn: TcpConnection) -> None:
        async for _ in conn:
            await conn.send_all(variable.get())
            variable.set(b"changed")

    handler: Any = Callbacks(message=message) if mode == "dispatch" else coroutine
    async with no_leaks(), EventLoopThreadPool(2) as pool, trio.open_nursery() as nursery:
        # Later than the threads have begun.
        variable.set(b"mine")
        server = local(handler, loops=pool)
        await nursery.start(server.serve)
        streams = [connect(server.addresses[0]) for _ in range(4)]
        for expected in (b"mine", b"changed"):
            for stream in streams:
                await stream.send_all(b"x")
                assert await stream.receive_some() == expected
        close_all(streams)
        server.close()


async def test_a_peer_keeps_its_loop() -> None:
    """With `peer_hash`, whatever a peer connects to is in one loop."""
    async with pooled(echo, choose="peer_hash") as server:
        streams: list[trio.SocketStream] = []
        loops: list[set[EventLoop]] = []
        for number in range(1, 9):
            before = set(server.connections)
            streams += await answered(server, 3, source=f"127.0.0.{number}")
            new = [conn for name, conn in server.connections.items() if name not in before]
            loops.append({conn.loop for conn in new})
        assert all(len(of_one) == 1 for of_one in loops)
        assert len(set.union(*loops)) == 2
        close_all(streams)


async def test_least_connections_balances() -> None:
    """Newcomers go where others have left."""
    async with pooled(echo, choose="least_connections") as server:
        streams = await answered(server, 8)
        first = min(by_loop(server), key=id)
        ports = {conn.peer_address[1] for conn in server.connections.values() if conn.loop is first}
        leaving = [stream for stream in streams if stream.socket.getsockname()[1] in ports]
        assert len(leaving) == 4
        close_all(leaving)
        await until(lambda: len(server.connections) == 4)
        streams += await answered(server, 4)
        assert by_loop(server)[first] == 4
        close_all(streams)


async def test_the_mapping_of_connections() -> None:
    """It is read-only, by name over all loops, and may be gone through while others come and go."""
    async with pooled(echo) as server:
        assert dict(server.connections) == {}
        streams = await answered(server, 4)
        names = list(server.connections)
        assert len(names) == len(server.connections) == 4
        assert [server.connections[name] for name in names] == list(server.connections.values())
        assert [name for name, conn in server.connections.items() if name != conn.name] == []
        assert names[0] in server.connections
        assert "nobody" not in server.connections
        assert names[0] in repr(server.connections)
        with pytest.raises(KeyError):
            _ = server.connections["nobody"]
        for name in server.connections:
            server.connections[name].loop.queue_in_loop(server.connections[name].force_close)
            await until(lambda name=name: name not in server.connections)
        close_all(streams)


@either_mode
async def test_counts_under_churn(handler: Any) -> None:
    """At every moment opened less closed is what lives, whatever the threads are at."""
    async with pooled(handler, 3) as server:
        done = False

        def check() -> None:
            """With whoever else runs, `len` is of a moment between two counts."""
            before = server.statistics()
            living = len(server.connections)
            after = server.statistics()
            for now in (before, after):
                assert now.opened - sum(now.closed.values()) == now.active
            assert before.opened - sum(after.closed.values()) <= living
            assert living <= after.opened - sum(before.closed.values())

        def look() -> None:
            while not done:
                check()
                for conn in server.connections.values():
                    assert conn.statistics().bytes_received >= 0

        async def churn(number: int) -> None:
            for turn in range(10):
                stream = connect(server.addresses[0])
                await answer(stream)
                if (number + turn) % 2:
                    reset(stream.socket)
                else:
                    await stream.aclose()
                check()

        # From a thread that is no loop's, too.
        looking = threading.Thread(target=look)
        looking.start()
        try:
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(churn, number)
        finally:
            done = True
            looking.join()
        await until(lambda: not server.connections)
        now = server.statistics()
        assert (now.opened, sum(now.closed.values())) == (100, 100)
        assert set(now.closed) <= {CloseReason.PEER_EOF, CloseReason.PEER_RESET}


async def test_memory_is_bounded_in_each_loop() -> None:
    """Peers that do not read stop their handlers at the high-water mark, in every loop."""

    async def chargen(conn: TcpConnection) -> None:
        while True:
            await conn.send_all(bytes(16384))

    marks = Watermarks(high=65536, low=16384)
    async with pooled(chargen, watermarks=marks) as server:
        streams = [connect(server.addresses[0]) for _ in range(4)]
        await until(lambda: server.statistics().pauses == 4)
        assert server.statistics().buffered <= 4 * (65536 + 16384)
        close_all(streams)


# -- limits


async def test_limits_are_exact_over_all_loops() -> None:
    """No loop lets in what the limit does not, and who leaves one makes room in the other."""
    async with pooled(echo, limits=Limits(connections=3)) as server:
        streams = await answered(server, 3)
        waiting = connect(server.addresses[0])
        await waiting.send_all(b"hello")
        with trio.move_on_after(0.05):
            await waiting.receive_some()
            pytest.fail("it came in")
        assert len(server.connections) == 3
        for _ in range(5):
            streams.pop(0).socket.close()
            with trio.fail_after(10):
                assert await waiting.receive_some() == b"hello"
            assert server.statistics().active <= 3
            streams.append(waiting)
            waiting = connect(server.addresses[0])
            await waiting.send_all(b"hello")
        close_all([*streams, waiting])


async def test_a_peers_share_is_over_all_loops() -> None:
    """`per_peer` counts a peer's connections wherever they are."""
    async with pooled(echo, limits=Limits(per_peer=2, when_full="reject")) as server:
        streams = await answered(server, 2)
        late = connect(server.addresses[0])
        assert await rest_of(late) == b""
        assert server.statistics().rejected == {"per_peer": 1}
        streams += await answered(server, 2, source="127.0.0.2")
        streams.pop(0).socket.close()
        await until(lambda: len(server.connections) == 3)
        # The accept loop hears of it with its next turn.
        await trio.testing.wait_all_tasks_blocked(0.01)
        streams += await answered(server, 1)
        close_all([*streams, late])


async def test_no_room_in_a_loops_epoll(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loop has no room for is closed and counted, and its permit is free again."""
    real = TcpConnection.from_socket
    failing = True

    def from_socket(*args: Any, **options: Any) -> TcpConnection:
        if failing:
            raise OSError(errno.ENOSPC, "no room")
        return real(*args, **options)

    monkeypatch.setattr(TcpConnection, "from_socket", from_socket)
    async with pooled(echo, limits=Limits(connections=1)) as server:
        client = connect(server.addresses[0])
        assert await rest_of(client) == b""
        await until(lambda: server.statistics().shed == 1)
        assert server.statistics().opened == 0
        failing = False
        close_all([client, *await answered(server, 1)])


# -- what one does to the others


async def test_a_loop_that_is_blocked_holds_up_no_other() -> None:
    """A handler that blocks its thread keeps those of its own loop waiting, and nobody else."""
    release = threading.Event()

    async def handler(conn: TcpConnection) -> None:
        async for chunk in conn:
            if chunk == b"block":
                release.wait(20)
            await conn.send_all(chunk)

    async with pooled(handler) as server:
        blocking, free = await answered(server, 2)
        try:
            await blocking.send_all(b"block")
            for _ in range(50):
                await answer(free)
            # What every thread may ask is answered.
            assert server.statistics().active == 2
        finally:
            release.set()
        assert await blocking.receive_some() == b"block"
        close_all([blocking, free])


@pytest.mark.parametrize("mode", ["coroutine", "dispatch"])
async def test_an_error_ends_one_connection(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """What a handler raises in a loop is logged, and the others of that loop go on."""

    def message(conn: TcpConnection, buffer: Buffer) -> None:
        if buffer.peek() == b"raise":
            raise ValueError("on purpose")
        conn.send(buffer.take())

    async def coroutine(conn: TcpConnection) -> None:
        await conn.dispatch(message)

    handler: Any = Callbacks(message=message) if mode == "dispatch" else coroutine
    async with pooled(handler) as server:
        streams = await answered(server, 4)
        await streams[0].send_all(b"raise")
        await rest_of(streams[0])
        for stream in streams[1:]:
            await answer(stream)
        await until(lambda: server.statistics().closed == {CloseReason.HANDLER_ERROR: 1})
        (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert record.name == "trioreactor.server"
        close_all(streams)


@pytest.mark.parametrize("mode", ["coroutine", "dispatch"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_what_ends_the_program(mode: str, error: type[BaseException]) -> None:
    """`SystemExit` from a handler in a loop comes out of `serve`, as it is; the connections of all
    loops are closed by then, and the pool lives.
    """

    def message(conn: TcpConnection, buffer: Buffer) -> None:
        if buffer.take() == b"exit":
            raise error("on purpose")
        conn.send(b"hello")

    async def coroutine(conn: TcpConnection) -> None:
        await conn.dispatch(message)

    handler: Any = Callbacks(message=message) if mode == "dispatch" else coroutine
    async with no_leaks(), EventLoopThreadPool(2) as pool, no_leaks():
        before = [await pool.run(loop, tasks) for loop in pool.loops]
        server = local(handler, loops=pool)
        with pytest.raises(BaseExceptionGroup) as caught:
            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve)
                streams = await answered(server, 4)
                await streams[1].send_all(b"exit")
                with trio.fail_after(10):
                    await trio.sleep_forever()
        (raised,) = caught.value.exceptions
        assert type(raised) is error
        assert str(raised) == "on purpose"
        assert server.statistics().closed == {CloseReason.CANCELLED: 4}
        assert balanced(server)
        assert [await pool.run(loop, tasks) for loop in pool.loops] == before
        close_all(streams)


# -- the end


@either_mode
async def test_cancelling_the_server(handler: Any) -> None:
    """It closes the connections of every loop at once, and they have ended when `serve` has."""
    async with no_leaks(), EventLoopThreadPool(2) as pool, no_leaks():
        before = [await pool.run(loop, tasks) for loop in pool.loops]
        server = local(handler, loops=pool)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            streams = await answered(server, 6)
            nursery.cancel_scope.cancel()
        assert server.statistics().closed == {CloseReason.CANCELLED: 6}
        assert [await pool.run(loop, tasks) for loop in pool.loops] == before
        close_all(streams)


@either_mode
async def test_cancelling_the_owner_of_both(handler: Any) -> None:
    """Pool and server end together."""
    async with no_leaks():
        with trio.CancelScope() as scope:
            async with EventLoopThreadPool(2) as pool, trio.open_nursery() as nursery:
                server = local(handler, loops=pool)
                await nursery.start(server.serve)
                streams = await answered(server, 6)
                scope.cancel()
        assert scope.cancelled_caught
        assert server.statistics().closed == {CloseReason.CANCELLED: 6}
        close_all(streams)


async def test_handlers_unwind_before_serve_returns() -> None:
    """A cancelled handler in another thread still has its cleanup, as in one loop."""
    unwound: list[str] = []

    async def handler(conn: TcpConnection) -> None:
        try:
            await echo(conn)
        finally:
            with trio.CancelScope(shield=True):
                await conn.send_all(b"bye")
                await trio.lowlevel.checkpoint()
            unwound.append(conn.name)

    async with no_leaks(), EventLoopThreadPool(2) as pool, no_leaks():
        server = local(handler, loops=pool)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            streams = await answered(server, 4)
            nursery.cancel_scope.cancel()
        assert len(unwound) == 4
        for stream in streams:
            assert await rest_of(stream) == b"bye"
        close_all(streams)


@either_mode
async def test_close(handler: Any) -> None:
    """It closes every connection, wherever it is."""
    async with pooled(handler, 3) as server:
        streams = await answered(server, 6)
        server.close()
        for stream in streams:
            assert await rest_of(stream) == b""
        await until(lambda: server.statistics().closed == {CloseReason.FORCED: 6})
        close_all(streams)


@pytest.mark.parametrize("handler", [echo, Callbacks(message=echo_message)])
async def test_closed_while_it_starts(handler: Any) -> None:
    """A server that is closed before every loop serves ends, too."""
    async with no_leaks(), EventLoopThreadPool(3) as pool, no_leaks():
        for turns in range(40):
            server = local(handler, loops=pool)
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(server.serve)
                    for _ in range(turns):
                        await trio.lowlevel.checkpoint()
                    if not server.addresses:
                        await until(lambda server=server: server.addresses)
                    server.close()


@either_mode
async def test_accepted_while_the_loops_end(handler: Any) -> None:
    """What is on its way to a loop that ends is closed, not lost: its client hears of it."""
    for turns in range(0, 60, 3):
        async with no_leaks(), EventLoopThreadPool(2) as pool, no_leaks():
            server = local(handler, loops=pool)
            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve)
                streams = [connect(server.addresses[0]) for _ in range(20)]
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            assert balanced(server)
            for stream in streams:
                assert await rest_of(stream) == b""
            close_all(streams)


async def test_the_pool_ends_before_the_server() -> None:
    """Then `serve` ends by it, and every connection has."""
    pool = EventLoopThreadPool(2)
    server = local(echo, loops=pool)
    outcomes: list[BaseException | None] = []
    async with no_leaks(), trio.open_nursery() as nursery:
        async with pool:
            await nursery.start(serve_and_keep, server, outcomes)
            streams = await answered(server, 4)
        for stream in streams:
            assert await rest_of(stream) == b""
        await until(lambda: outcomes)
        assert isinstance(outcomes[0], trio.RunFinishedError)
        assert server.statistics().closed == {CloseReason.CANCELLED: 4}
        close_all(streams)


class RefusingLoop(EventLoop):
    """This run's loop, which may say that it is over."""

    refuses = False

    def queue_in_loop(self, fn: Callable[..., object], *args: Any) -> None:
        if self.refuses and fn.__name__ == "_admit_in_context":
            raise trio.RunFinishedError("on purpose")
        super().queue_in_loop(fn, *args)


class OneLoop:
    """What a server asks of a pool, with no other thread."""

    def __init__(self, loop: EventLoop) -> None:
        self.loops = [loop]
        self.load = 0
        # Around all that runs in it.
        self.scope = trio.CancelScope()

    def take_loop(self, peer: SocketAddress) -> EventLoop:
        self.load += 1
        return self.loops[0]

    def give_back(self, loop: EventLoop) -> None:
        assert loop is self.loops[0]
        self.load -= 1

    async def run(self, loop: EventLoop, fn: Callable[..., Any], *args: Any) -> Any:
        assert loop is self.loops[0]
        with self.scope:
            return await fn(*args)


@pytest.mark.parametrize("handler", [echo, Callbacks(message=echo_message)])
async def test_handed_over_too_late(handler: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A loop's part of the server has ended, and the accept loop has not heard of it yet: what it
    hands over is closed, its permit is free again, and nobody is alarmed.
    """
    pool = OneLoop(EventLoop.current())
    async with no_leaks():
        server = local(handler, loops=pool, limits=Limits(connections=2))
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            streams = await answered(server, 2)
            pool.scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            streams += [connect(server.addresses[0]) for _ in range(3)]
            for stream in streams:
                assert await rest_of(stream) == b""
            assert server.statistics().closed == {CloseReason.CANCELLED: 2}
            assert balanced(server)
            await until(lambda: not pool.load)
            close_all(streams)
            server.close()
    assert not caplog.records


class CountingPool(EventLoopThreadPool):
    """Remembers how many tasks a loop has, before and right after what is run in it."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.counts: list[tuple[int, int]] = []

    async def run(self, loop: EventLoop, fn: Callable[..., Any], *args: Any) -> Any:
        async def counted() -> Any:
            before = trio.lowlevel.current_statistics().tasks_living
            result = await fn(*args)
            self.counts.append((before, trio.lowlevel.current_statistics().tasks_living))
            return result

        return await super().run(loop, counted)


@either_mode
async def test_a_loop_has_no_task_left_when_its_part_has_ended(handler: Any) -> None:
    """Not even the poller's, at the very moment when the server hears of it."""
    async with no_leaks(), CountingPool(2) as pool:
        server = local(handler, loops=pool)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            streams = await answered(server, 4)
            server.close()
        assert len(pool.counts) == 2
        assert all(before == after for before, after in pool.counts)
        close_all(streams)


async def test_handed_to_a_loop_that_is_over() -> None:
    """A loop that refuses to be told anything costs one connection, and no permit."""
    loop = RefusingLoop()
    pool = OneLoop(loop)
    async with no_leaks():
        server = local(echo, loops=pool, limits=Limits(connections=1))
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            loop.refuses = True
            for _ in range(3):
                client = connect(server.addresses[0])
                assert await rest_of(client) == b""
                client.socket.close()
            loop.refuses = False
            close_all(await answered(server, 1))
            await until(lambda: not server.connections)
            assert server.statistics().opened == 1
            server.close()
        assert pool.load == 0


# -- drain


@pytest.mark.parametrize("mode", ["coroutine", "dispatch"])
async def test_drain_reaches_all_loops(mode: str) -> None:
    """Each connection hears of it in its own loop, and the report counts them all."""

    async def coroutine(conn: TcpConnection) -> None:
        await conn.send_all(b"hello")
        await conn.draining.wait()
        await conn.send_all(b"bye")

    def up(conn: TcpConnection) -> None:
        if conn.close_reason is None:
            conn.send(b"hello")

    def draining(conn: TcpConnection) -> None:
        assert conn.loop.in_loop
        conn.send(b"bye")
        conn.shutdown()

    handler: Any = coroutine
    if mode == "dispatch":
        handler = Callbacks(message=echo_message, connection=up, draining=draining)
    async with pooled(handler, 3) as server:
        streams = [connect(server.addresses[0]) for _ in range(6)]
        for stream in streams:
            assert await stream.receive_some() == b"hello"
        # Those of the backlog are taken, too.
        streams += [connect(server.addresses[0]) for _ in range(3)]

        async def finish(stream: trio.SocketStream, expected: bytes) -> None:
            assert await everything(stream) == expected
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            for number, stream in enumerate(streams):
                nursery.start_soon(finish, stream, b"bye" if number < 6 else b"hellobye")
            report = await server.drain(10)
        assert (report.finished, report.forced, report.stuck) == (9, (), ())
        assert report.seconds < 5
        assert server.statistics().opened == 9


async def test_drain_with_a_handler_that_resists() -> None:
    """One that shields itself in one loop is named; the others of all loops are only forced."""
    release = threading.Event()

    async def handler(conn: TcpConnection) -> None:
        async for chunk in conn:
            await conn.send_all(chunk)
            if chunk == b"shield":
                with trio.CancelScope(shield=True):
                    while not release.is_set():
                        await trio.sleep(0.001)

    async with pooled(handler, timeouts=Timeouts(linger=0.05)) as server:
        streams = await answered(server, 4)
        await answer(streams[2], b"shield")
        stuck = name_of(server, streams[2])
        streams.pop(0).socket.close()
        await until(lambda: len(server.connections) == 3)
        present = set(server.connections)
        report = await server.drain(0.02)
        assert set(report.forced) == present
        assert report.stuck == (stuck,)
        assert report.finished in {0, 1}
        release.set()
        close_all(streams)


async def test_drain_with_a_loop_that_is_blocked() -> None:
    """A handler that blocks its thread cannot even be cancelled: the drain returns all the same,
    within its time, and names those of that loop.
    """
    release = threading.Event()
    blocked = threading.Event()

    async def handler(conn: TcpConnection) -> None:
        async for chunk in conn:
            if chunk == b"block":
                blocked.set()
                release.wait(20)
            await conn.send_all(chunk)

    async with pooled(handler, timeouts=Timeouts(linger=0.05)) as server:
        streams = await answered(server, 4)
        await streams[0].send_all(b"block")
        await trio.to_thread.run_sync(blocked.wait, 20)
        stuck = {name_of(server, streams[0]), name_of(server, streams[2])}
        try:
            report = await server.drain(0.02)
        finally:
            release.set()
        assert set(report.stuck) == stuck
        assert stuck < set(report.forced)
        assert len(report.forced) == 4
        assert report.finished == 0
        assert report.seconds < 5
        close_all(streams)


def name_of(server: TcpServer, client: trio.SocketStream) -> str:
    """The server's connection to *client*."""
    address = client.socket.getsockname()
    (name,) = [n for n, conn in server.connections.items() if conn.peer_address == address]
    return name


# -- broadcast


@either_mode
async def test_broadcast_from_the_servers_loop(handler: Any) -> None:
    """It reaches the connections of all loops, each of which gets all messages in order."""
    async with pooled(handler, 3) as server:
        streams = await answered(server, 7)
        for number in range(100):
            assert server.broadcast(b"%d," % number) == 7
        expected = b"".join(b"%d," % number for number in range(100))
        for stream in streams:
            got = b""
            while len(got) < len(expected):
                got += await stream.receive_some()
            assert got == expected
        assert server.broadcast(b"") == 7
        close_all(streams)


async def test_broadcast_from_a_connections_loop() -> None:
    """A handler says it to its own loop at once and to the others soon, itself included."""
    counts: list[int] = []

    async def chat(conn: TcpConnection) -> None:
        async for chunk in conn:
            before = conn.statistics().bytes_sent
            counts.append(server.broadcast(chunk))
            assert conn.statistics().bytes_sent == before + len(chunk)

    async with pooled(chat) as server:
        streams = [connect(server.addresses[0]) for _ in range(5)]
        await until(lambda: len(server.connections) == 5)
        for number, stream in enumerate(streams):
            text = b"from %d" % number
            await stream.send_all(text)
            for each in streams:
                assert await each.receive_some() == text
        assert counts == [5] * 5
        close_all(streams)


async def test_broadcast_to_some() -> None:
    """Each of those is told in its own loop, and nobody else; who has ended is left out."""
    async with pooled(echo, 3) as server:
        streams = await answered(server, 7)
        chosen = streams[1:4]
        conns = [server.connections[name_of(server, stream)] for stream in chosen]
        gone = server.connections[name_of(server, streams[6])]
        streams.pop().socket.close()
        await until(lambda: len(server.connections) == 6)
        assert server.broadcast(b"you", to=[*conns, gone]) == 3
        server.broadcast(b"all")
        for stream in streams:
            expected = b"youall" if stream in chosen else b"all"
            got = b""
            while len(got) < len(expected):
                got += await stream.receive_some()
            assert got == expected
        close_all(streams)


async def test_what_a_slow_one_drops_is_told_in_its_loop() -> None:
    """`overflow` and `on_drop` are of the connection's own loop."""
    told: list[tuple[bool, int]] = []

    def on_drop(conn: TcpConnection, count: int) -> None:
        told.append((conn.loop.in_loop, count))

    marks = Watermarks(high=1000, low=500, limit=4096)
    options: Any = {"overflow": "drop_newest", "on_drop": on_drop, "watermarks": marks}
    options["socket_options"] = SocketOptions(send_buffer=4096)
    async with pooled(echo, **options) as server:
        streams = await answered(server, 2)
        while len(told) < 5:
            server.broadcast(bytes(2000))
            await trio.lowlevel.checkpoint()
        assert all(here for here, _ in told)
        assert len(server.connections) == 2
        assert server.statistics().dropped >= sum(count for _, count in told[:5])
        close_all(streams)


# -- what it refuses


async def test_a_pool_that_does_not_run() -> None:
    """It is said so when the server begins, and its listening sockets are closed."""
    async with no_leaks():
        server = local(echo, loops=EventLoopThreadPool(2))
        with pytest.raises(RuntimeError, match="async with"):
            await server.serve()


async def test_a_nursery_is_of_one_loop() -> None:
    """Tasks of other threads cannot run in a nursery of this one."""
    async with no_leaks(), EventLoopThreadPool(1) as pool, trio.open_nursery() as nursery:
        server = local(echo, loops=pool)
        with pytest.raises(TypeError, match="handler_nursery"):
            await server.serve(handler_nursery=nursery)


@pytest.mark.pure
def test_no_pool() -> None:
    """Anything else is refused at once."""
    wrong: Any = 2
    with pytest.raises(TypeError, match="EventLoopThreadPool"):
        TcpServer(echo, 0, loops=wrong)


async def test_a_loop_that_is_held(caplog: pytest.LogCaptureFixture) -> None:
    """The watchdog looks at each of the loops; `watchdog=None` is for all of them."""

    def said() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == "trioreactor.watchdog"]

    async def hold(conn: TcpConnection) -> None:
        await conn.receive_some()
        deadline = time.perf_counter() + 10
        while not said() and time.perf_counter() < deadline:
            time.sleep(0.01)
        conn.send(b"x")

    async with pooled(hold, watchdog=0.05) as server:
        assert watching_threads() == 3
        async with connect(server.addresses[0]) as stream:
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
        assert "#1" in said()[0]
        # The turn that has answered is over a moment later.
        await until(lambda: server.statistics().loop_holds == 1)
        lag = server.statistics().loop_lag
        assert lag is not None
        assert lag >= 0.05
    assert watching_threads() == 0
    async with pooled(echo, watchdog=None) as server:
        assert watching_threads() == 0
        assert server.statistics().loop_lag is None
