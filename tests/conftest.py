"""What every test may use: real connected pairs, and counts of what must not leak."""

from __future__ import annotations

import gc
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest
import trio

from trioreactor import TcpConnection, TcpServer

Pair = tuple[TcpConnection, TcpConnection]


def pytest_collection_finish() -> None:
    """Many tests collect garbage. There is none among the tests themselves, which are by far the
    most that would be looked through.
    """
    gc.collect()
    gc.freeze()


def open_descriptors() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def living_tasks() -> int:
    """How many tasks this trio run has."""
    return trio.lowlevel.current_statistics().tasks_living


@asynccontextmanager
async def no_leaks() -> AsyncIterator[None]:
    """Promises F and T: descriptors and tasks are afterwards what they were before."""
    before = open_descriptors(), living_tasks()
    yield
    # A forceful close ends no task by itself: whoever was woken still has to run.
    await trio.testing.wait_all_tasks_blocked()
    assert (open_descriptors(), living_tasks()) == before


async def tcp_streams() -> tuple[trio.SocketStream, trio.SocketStream]:
    """A connected pair of trio's own streams over loopback."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        client = await trio.testing.open_stream_to_socket_listener(listener)
        return client, await listener.accept()


async def tcp_pair(**options: Any) -> Pair:
    """A connected pair over TCP."""
    left, right = await tcp_streams()
    return TcpConnection(left, **options), TcpConnection(right, **options)


async def unix_pair(**options: Any) -> Pair:
    """A connected pair over Unix sockets."""
    left, right = trio.socket.socketpair()
    return (
        TcpConnection(trio.SocketStream(left), **options),
        TcpConnection(trio.SocketStream(right), **options),
    )


@pytest.fixture(params=[tcp_pair, unix_pair], ids=["tcp", "unix"])
def make_pair(request: pytest.FixtureRequest) -> Callable[..., Awaitable[Pair]]:
    """Each kind of pair in turn."""
    maker: Callable[..., Awaitable[Pair]] = request.param
    return maker


@asynccontextmanager
async def serving(server: TcpServer) -> AsyncIterator[tuple[str, int]]:
    """Serve in the background, on loopback, and give the address; closed at the end."""
    async with trio.open_nursery() as nursery:
        (acceptor, *_) = await nursery.start(server.serve)
        host, port = acceptor.address[:2]
        yield host, port
        server.close()


def reset(sock: socket.socket | trio.socket.SocketType) -> None:
    """Close with RST instead of FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def vanish(sock: socket.socket) -> None:
    """Close with neither FIN nor RST, as a machine that loses its power (Linux, root)."""
    tcp_repair = 19
    sock.setsockopt(socket.IPPROTO_TCP, tcp_repair, 1)
    sock.close()


async def fill(conn: TcpConnection, size: int = 65536) -> int:
    """Send until congested; how many bytes that took."""
    sent = 0
    while conn.send(bytes(size)):
        sent += size
    return sent + size


async def echo(conn: TcpConnection) -> None:
    """The handler that most tests want: send back what comes."""
    async for chunk in conn:
        await conn.send_all(chunk)


async def until(condition: Callable[[], object]) -> None:
    """Wait, within bounds, until *condition* holds."""
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.001)


def connect(address: Any, *, source: str = "127.0.0.1") -> trio.SocketStream:
    """A client on loopback, connected at once: the kernel does that with no help from accept."""
    sock = socket.create_connection(address, source_address=(source, 0))
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def cancelled_after(turns: int, fn: Callable[[], Awaitable[object]]) -> bool:
    """Run *fn*, cancelled after so many turns of the loop (0: before it begins).

    False if it ended by itself. Called for 0, 1, 2, ... it cancels at every checkpoint in turn.
    """
    scope = trio.CancelScope()

    async def cancel() -> None:
        for _ in range(turns - 1):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    async with trio.open_nursery() as nursery:
        if turns:
            nursery.start_soon(cancel)
        else:
            scope.cancel()
        with scope:
            await fn()
        nursery.cancel_scope.cancel()
    return scope.cancelled_caught


@asynccontextmanager
async def listening() -> AsyncIterator[trio.SocketListener]:
    """A listening socket on loopback, whose connections the test takes itself."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        yield listener


@pytest.fixture
async def listener() -> AsyncIterator[trio.SocketListener]:
    """A server's end, whose connections the test takes itself."""
    async with listening() as listener:
        yield listener


def address_of(listener: trio.SocketListener) -> tuple[str, int]:
    """Where *listener* listens."""
    host, port = listener.socket.getsockname()[:2]
    return host, port


@contextmanager
def refusing() -> Iterator[socket.socket]:
    """A socket on loopback that refuses, for nobody listens; nobody else can take its port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock


@contextmanager
def unanswering() -> Iterator[tuple[str, int]]:
    """An address on loopback that answers nothing: its queue is full, so SYNs are dropped."""
    with ExitStack() as stack:
        listener = stack.enter_context(refusing())
        listener.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()


async def accepted(listener: trio.SocketListener) -> trio.SocketStream:
    """The server's end of the next connection, once the client has its own; within bounds."""
    with trio.fail_after(10):
        stream = await listener.accept()
    try:
        await trio.testing.wait_all_tasks_blocked()
    except trio.Cancelled:
        stream.socket.close()
        raise
    return stream


async def everything(stream: trio.abc.ReceiveStream) -> bytes:
    """What comes until EOF, within bounds."""
    got = bytearray()
    with trio.fail_after(10):
        while chunk := await stream.receive_some():
            got += chunk
    return bytes(got)
