"""Cancelled at every checkpoint there is: nothing is lost (B), leaked (F, T) or miscounted (C)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.conftest import Pair, fill, living_tasks, no_leaks, open_descriptors, tcp_pair
from trioreactor import (
    Acceptor,
    CloseReason,
    ConnectionState,
    TcpConnection,
    TcpServer,
    Timeouts,
    Watermarks,
    open_tcp_acceptors,
)


class CancelAtStep(trio.abc.Instrument):
    """Cancels *scope* when the task that made this has been stepped *number* times."""

    def __init__(self, scope: trio.CancelScope, number: int) -> None:
        self.task = trio.lowlevel.current_task()
        self.scope = scope
        self.left = number

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """The task has come to a checkpoint, or parked."""
        if task is self.task:
            self.left -= 1
            if not self.left:
                self.scope.cancel()


# More than any of the operations has.
MOST_STEPS = 200


async def sweep(attempt: Callable[[int], Awaitable[bool]]) -> int:
    """Run *attempt* with 0, 1, 2, ... steps before the cancellation, until it came too late."""
    for number in range(MOST_STEPS):
        if not await attempt(number):
            return number
    raise AssertionError("still cancelled after many steps")


@asynccontextmanager
async def cancelled_at(number: int) -> AsyncIterator[trio.CancelScope]:
    """A scope that is cancelled after *number* steps of this task (0: before the first)."""
    with trio.CancelScope() as scope:
        if not number:
            scope.cancel()
            yield scope
            return
        instrument = CancelAtStep(scope, number)
        trio.lowlevel.add_instrument(instrument)
        try:
            yield scope
        finally:
            trio.lowlevel.remove_instrument(instrument)


async def read_to_end(conn: TcpConnection) -> bytes:
    """All that comes until EOF."""
    got = bytearray()
    async for chunk in conn:
        got += chunk
    return bytes(got)


@pytest.mark.parametrize("clogged", [False, True])
async def test_send_all(make_pair: Callable[..., Awaitable[Pair]], clogged: bool) -> None:
    """A cancelled `send_all` sent all of it or nothing, and what follows joins on."""

    async def attempt(number: int) -> bool:
        async with no_leaks():
            left, right = await make_pair()
            before = bytes(await fill(left)) if clogged else b""
            message = b"m" * 2_000_000
            got = b""

            async def read() -> None:
                nonlocal got
                # Late, so that there is a wait to be cancelled.
                await trio.testing.wait_all_tasks_blocked()
                got = await read_to_end(right)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                async with cancelled_at(number) as scope:
                    await left.send_all(message)
                await left.send_all(b"end")
                await left.aclose()
            assert got in (before + message + b"end", before + b"end")
            if not number:
                assert got == before + b"end"
            await right.aclose()
            return scope.cancelled_caught

    assert await sweep(attempt) >= 1


async def test_receive_some(make_pair: Callable[..., Awaitable[Pair]]) -> None:
    """A cancelled `receive_some` has taken nothing."""

    async def attempt(number: int) -> bool:
        async with no_leaks():
            left, right = await make_pair()
            got = b""

            async def send_late() -> None:
                await trio.testing.wait_all_tasks_blocked()
                await left.send_all(b"hello")
                await left.send_eof()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send_late)
                async with cancelled_at(number) as scope:
                    got += await right.receive_some()
                got += await read_to_end(right)
            assert got == b"hello"
            await left.aclose()
            await right.aclose()
            return scope.cancelled_caught

    assert await sweep(attempt) >= 1


@pytest.mark.parametrize("clogged", [False, True])
async def test_send_eof(make_pair: Callable[..., Awaitable[Pair]], clogged: bool) -> None:
    """A cancelled `send_eof` still sends it after the data, or was never begun."""

    async def attempt(number: int) -> bool:
        async with no_leaks():
            left, right = await make_pair()
            size = await fill(left) if clogged else 0
            async with trio.open_nursery() as nursery:
                got: list[bytes] = []

                async def read() -> None:
                    await trio.testing.wait_all_tasks_blocked()
                    got.append(await read_to_end(right))

                async with cancelled_at(number) as scope:
                    if number:
                        nursery.start_soon(read)
                    await left.send_eof()
                if not number:
                    assert left.state is ConnectionState.CONNECTED
                    nursery.start_soon(read)
                    await left.send_eof()
            assert [len(data) for data in got] == [size]
            await left.aclose()
            await right.aclose()
            return scope.cancelled_caught

    assert await sweep(attempt) >= 1


@pytest.mark.parametrize("unread", [False, True])
@pytest.mark.parametrize("clogged", [False, True])
async def test_aclose(
    make_pair: Callable[..., Awaitable[Pair]], clogged: bool, unread: bool
) -> None:
    """A cancelled `aclose` has closed all the same, and what arrived is a prefix."""

    async def attempt(number: int) -> bool:
        async with no_leaks():
            left, right = await make_pair()
            size = await fill(left) if clogged else 0
            if unread:
                await right.send_all(b"nobody reads this")
                await trio.testing.wait_all_tasks_blocked()
            got = 0

            async def read() -> None:
                nonlocal got
                await trio.testing.wait_all_tasks_blocked()
                try:
                    async for chunk in right:
                        got += len(chunk)
                except trio.BrokenResourceError:
                    pass
                await right.aclose()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                async with cancelled_at(number) as scope:
                    await left.aclose()
                assert left.state is ConnectionState.DISCONNECTED
            if scope.cancelled_caught:
                assert left.close_reason is CloseReason.CANCELLED
                assert got <= size
            else:
                assert left.close_reason is CloseReason.LOCAL_CLOSE
                assert got == size
            return scope.cancelled_caught

    assert await sweep(attempt) >= 1


async def test_dispatch(make_pair: Callable[..., Awaitable[Pair]]) -> None:
    """A cancelled `dispatch` leaves what it had not handed out, or what was left, for the next."""

    async def attempt(number: int) -> bool:
        async with no_leaks():
            left, right = await make_pair()
            got = bytearray()

            def on_message(conn: TcpConnection, buffer: object) -> None:
                got.extend(conn._read.buffer.take(1))

            async def send_late() -> None:
                await trio.testing.wait_all_tasks_blocked()
                await left.send_all(b"hello")
                await left.send_eof()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send_late)
                async with cancelled_at(number) as scope:
                    await right.dispatch(on_message)
                got += await read_to_end(right)
            assert got == b"hello"
            await left.aclose()
            await right.aclose()
            return scope.cancelled_caught

    assert await sweep(attempt) >= 1


async def test_accept() -> None:
    """A cancelled `accept` has taken no connection: the next one gets it."""

    async def attempt(number: int) -> bool:
        async with no_leaks():
            (acceptor,) = await open_tcp_acceptors(0, host="127.0.0.1")
            streams: list[trio.abc.AsyncResource] = []

            async def connect_late() -> None:
                await trio.testing.wait_all_tasks_blocked()
                streams.append(await trio.testing.open_stream_to_socket_listener(acceptor))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(connect_late)
                async with cancelled_at(number) as scope:
                    streams.append(await acceptor.accept())
                if scope.cancelled_caught:
                    streams.append(await acceptor.accept())
            assert len(streams) == 2
            assert acceptor.statistics().accepted == 1
            for stream in streams:
                await stream.aclose()
            await acceptor.aclose()
            return scope.cancelled_caught

    assert await sweep(attempt) >= 1


async def test_serve() -> None:
    """A cancelled server has closed its listeners and connections, and counted each of them."""

    async def attempt(number: int) -> bool:
        before = open_descriptors(), living_tasks()
        done = False

        async def handler(conn: TcpConnection) -> None:
            async for chunk in conn:
                await conn.send_all(chunk)

        server = TcpServer(handler, 0, host="127.0.0.1", timeouts=Timeouts(linger=0.1))

        async def client(
            task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
        ) -> None:
            # Takes the place of nursery.start: serve itself must run in the swept task.
            task_status.started([])
            while not server.addresses:
                await trio.lowlevel.checkpoint()
            try:
                for _ in range(3):
                    stream = await trio.open_tcp_stream(*server.addresses[0][:2])
                    async with stream:
                        await stream.send_all(b"hello")
                        await stream.receive_some()
            except (OSError, trio.BrokenResourceError, IndexError):
                pass
            nonlocal done
            done = True
            server.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(client)
            async with cancelled_at(number) as scope:
                await server.serve()
            nursery.cancel_scope.cancel()
        statistics = server.statistics()
        assert statistics.opened == sum(statistics.closed.values())
        assert not server.connections
        assert not server.addresses
        await trio.testing.wait_all_tasks_blocked()
        assert (open_descriptors(), living_tasks()) == before
        return scope.cancelled_caught

    assert await sweep(attempt) >= 1


async def test_drain(autojump_clock: trio.testing.MockClock) -> None:
    """A cancelled `drain` leaves a server that `close` still ends, with everything counted."""

    async def attempt(number: int) -> bool:
        async with no_leaks():

            async def handler(conn: TcpConnection) -> None:
                await trio.sleep_forever()

            server = TcpServer(handler, 0, host="127.0.0.1")
            async with trio.open_nursery() as nursery:
                (acceptor,) = await nursery.start(server.serve)
                stream = await trio.testing.open_stream_to_socket_listener(acceptor)
                while not server.connections:
                    await trio.testing.wait_all_tasks_blocked()
                async with cancelled_at(number) as scope:
                    await server.drain(1)
                server.close()
            statistics = server.statistics()
            assert statistics.opened == sum(statistics.closed.values()) == 1
            await stream.aclose()
            return scope.cancelled_caught

    assert await sweep(attempt) >= 1


async def test_a_torn_message_is_never_followed() -> None:
    """`send_all` beyond the limit, cancelled at each step: all of it, nothing, or a broken end."""

    async def attempt(number: int) -> bool:
        async with no_leaks():
            left, right = await tcp_pair(watermarks=Watermarks(high=8192, low=2048, limit=16384))
            message = bytes(range(256)) * 400
            got = bytearray()

            async def read() -> None:
                try:
                    async for chunk in right:
                        got.extend(chunk)
                except trio.BrokenResourceError:
                    pass

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                async with cancelled_at(number) as scope:
                    await left.send_all(message)
                if left.state is ConnectionState.CONNECTED:
                    await left.send_all(b"end")
                await left.aclose()
            if left.close_reason is CloseReason.CANCELLED:
                assert message.startswith(bytes(got))
            else:
                assert got in (message + b"end", b"end")
            await right.aclose()
            return scope.cancelled_caught

    assert await sweep(attempt) >= 2
