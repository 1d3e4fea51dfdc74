"""Every public async method checkpoints, on success: trio's own rule."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.conftest import Pair, fill, tcp_pair, unix_pair
from trioreactor import (
    Acceptor,
    Callbacks,
    TcpServer,
    Timeouts,
    open_tcp_acceptors,
    open_unix_acceptor,
)


async def prepared_receive(left: trio.abc.Stream, right: trio.abc.Stream) -> None:
    """Input is there already, so nothing has to be waited for."""
    await right.send_all(b"x")
    await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.send_all(b"x"),
        lambda c: c.send_all(b""),
        lambda c: c.receive_some(),
        lambda c: c.receive_some(1),
        lambda c: c.wait_send_all_might_not_block(),
        lambda c: c.wait_drained(),
        lambda c: c.send_eof(),
        lambda c: c.aclose(),
        lambda c: c.__anext__(),
    ],
    ids=[
        "send_all",
        "send_all-empty",
        "receive_some",
        "receive_some-1",
        "wait_send_all_might_not_block",
        "wait_drained",
        "send_eof",
        "aclose",
        "anext",
    ],
)
async def test_connection_methods(
    make_pair: Callable[..., Awaitable[Pair]], call: Callable[..., Awaitable[object]]
) -> None:
    """Also when there is nothing to wait for."""
    # Unread input makes closing linger, which is not the point here.
    left, right = await make_pair(timeouts=Timeouts(linger=0.01))
    await prepared_receive(left, right)
    with trio.testing.assert_checkpoints():
        await call(left)
    await left.aclose()
    with trio.testing.assert_checkpoints():
        await left.aclose()
    with trio.testing.assert_checkpoints():
        await left.wait_closed()
    await right.aclose()


async def test_methods_that_did_wait(make_pair: Callable[..., Awaitable[Pair]]) -> None:
    """And when there was."""
    left, right = await make_pair()
    size = await fill(left)

    async def checked(call: Awaitable[object]) -> None:
        with trio.testing.assert_checkpoints():
            await call

    async with trio.open_nursery() as nursery:
        nursery.start_soon(checked, left.send_all(b"x"))
        nursery.start_soon(checked, left.wait_drained())
        await trio.testing.wait_all_tasks_blocked()
        got = 0
        while got < size + 1:
            got += len(await right.receive_some())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(checked, right.receive_some())
        await trio.testing.wait_all_tasks_blocked()
        left.send(b"y")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(checked, right.wait_closed())
        nursery.start_soon(checked, right.dispatch(lambda conn, buffer: None))
        await trio.testing.wait_all_tasks_blocked()
        await left.aclose()
        await trio.testing.wait_all_tasks_blocked()
        # At EOF already.
        await checked(right.dispatch(lambda conn, buffer: None))
        await checked(right.receive_some())
        right.force_close()


async def test_callbacks_checkpoint() -> None:
    """`Callbacks` called as a handler, with a peer that is gone already."""
    left, right = await tcp_pair()
    await right.aclose()
    with trio.testing.assert_checkpoints():
        await Callbacks(message=lambda conn, buffer: None)(left)


async def test_acceptor_methods() -> None:
    """`accept` with a connection waiting, `wait_acceptable`, `aclose`."""
    (acceptor,) = await open_tcp_acceptors(0, host="127.0.0.1")
    streams = [await trio.testing.open_stream_to_socket_listener(acceptor) for _ in range(2)]
    with trio.testing.assert_checkpoints():
        await acceptor.wait_acceptable()
    for _ in range(2):
        with trio.testing.assert_checkpoints():
            streams.append(await acceptor.accept())
    with trio.testing.assert_checkpoints():
        await acceptor.aclose()
    with trio.testing.assert_checkpoints():
        await acceptor.aclose()
    for stream in streams:
        await stream.aclose()


async def test_opening_methods(tmp_path: Path) -> None:
    """The functions that open listening sockets."""
    with trio.testing.assert_checkpoints():
        acceptors = await open_tcp_acceptors(0, host="127.0.0.1")
    with trio.testing.assert_checkpoints():
        acceptors.append(await open_unix_acceptor(tmp_path / "sock"))
    for acceptor in acceptors:
        acceptor.close()


async def test_server_methods() -> None:
    """`serve` and `drain`."""

    async def handler(conn: trio.abc.Stream) -> None:
        await conn.receive_some()

    server = TcpServer(handler, 0, host="127.0.0.1")

    async def serve(task_status: trio.TaskStatus[list[Acceptor]]) -> None:
        with trio.testing.assert_checkpoints():
            await server.serve(task_status=task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(serve)
        with trio.testing.assert_checkpoints():
            await server.drain(1)
    with trio.testing.assert_checkpoints():
        await server.drain(0)


async def test_sync_methods_do_not() -> None:
    """What is not async never gives up the turn."""
    left, right = await unix_pair()
    with trio.testing.assert_no_checkpoints():
        left.send(b"x")
        left.stop_reading()
        left.start_reading()
        left.shutdown()
        left.force_close_after(1)
        left.statistics()
        left.force_close()
        right.force_close()
