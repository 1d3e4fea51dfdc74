"""TrioPoller: the same reactor on trio's own waits, with no task left over."""

from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from tests.conftest import fill, living_tasks, no_leaks, tcp_pair, unix_pair, until
from trioreactor import TcpConnection
from trioreactor.buffer import Buffer

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture(autouse=True)
def trio_poller(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about this poller, whatever the environment says."""
    monkeypatch.setenv("TRIOREACTOR_POLLER", "trio")


async def test_watchers_end_with_their_connection() -> None:
    """While nobody waits there is no watcher; those that wait end with the connection."""
    async with no_leaks():
        left, right = await tcp_pair()
        idle = living_tasks()
        left.send(b"x")
        assert await right.receive_some() == b"x"
        await settled()
        assert living_tasks() == idle
        with trio.move_on_after(0.01):
            await right.receive_some()
        # It waits on, and the next reader finds it.
        assert living_tasks() == idle + 1
        with trio.move_on_after(0.01):
            await right.receive_some()
        assert living_tasks() == idle + 1
        # The one that waits is answered, and another waits for room.
        await fill(left)
        await settled()
        assert living_tasks() == idle + 1
        right.force_close()
        left.force_close()


async def test_watchers_end_where_trio_has_no_socket() -> None:
    """The same for a connection as a server makes it, whose close only we can tell trio of."""
    async with no_leaks():
        conns = []
        for sock in socket.socketpair():
            sock.setblocking(False)
            conns.append(TcpConnection.from_socket(sock, local_address="", peer_address=""))
        for conn in conns:
            with trio.move_on_after(0.01):
                await conn.receive_some()
        for conn in conns:
            conn.force_close()


@pytest.mark.parametrize("mode", ["coroutine", "dispatch"])
async def test_many_waits_leave_nothing(mode: str) -> None:
    """However often somebody waits, in both directions, there is at most one watcher for each."""
    async with no_leaks():
        left, right = await unix_pair()
        most = 0

        def on_message(conn: TcpConnection, buffer: Buffer) -> None:
            conn.send(buffer.take())

        async def echo() -> None:
            if mode == "dispatch":
                await right.dispatch(on_message)
            else:
                async for chunk in right:
                    right.send(chunk)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo)
            await settled()
            base = living_tasks()
            for _ in range(300):
                left.send(b"x")
                await left.receive_some()
                most = max(most, living_tasks())
            left.shutdown()
        assert most <= base + 2
        left.force_close()
        right.force_close()


async def test_stop_and_start_reading() -> None:
    """Stopping and starting over and over loses nothing and leaves nothing."""
    async with no_leaks():
        left, right = await unix_pair()
        got = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(right.dispatch, lambda conn, buffer: got.extend(buffer.take()))
            await settled()
            base = living_tasks()
            for n in range(50):
                right.stop_reading()
                left.send(bytes([n]))
                await settled()
                assert len(got) == n
                right.start_reading()
                await until(lambda n=n: len(got) == n + 1)
                right.stop_reading()
                right.start_reading()
                await settled()
                assert living_tasks() == base
            left.shutdown()
        assert got == bytes(range(50))
        left.force_close()
        right.force_close()


async def test_somebody_else_waits_for_the_descriptor() -> None:
    """Trio lets one task wait for a descriptor. A stranger who does must not end the run."""
    async with no_leaks():
        left, right = await unix_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.wait_readable, right.socket)
            nursery.start_soon(trio.lowlevel.wait_writable, left.socket)
            await settled()
            left.send(b"x")
            with trio.fail_after(10):
                assert await right.receive_some() == b"x"
            nursery.cancel_scope.cancel()
        left.force_close()
        right.force_close()


async def test_waiting_with_a_stranger() -> None:
    """The same when the stranger waits first and the input comes later."""
    async with no_leaks():
        left, right = await unix_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.wait_readable, right.socket)
            await settled()

            async def send_later() -> None:
                await settled(0.01)
                left.send(b"x")

            nursery.start_soon(send_later)
            with trio.fail_after(10):
                assert await right.receive_some() == b"x"
        left.force_close()
        right.force_close()
