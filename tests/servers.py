"""What the tests of servers share: clients, handlers, and a listening socket that fails."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.conftest import connect
from trioreactor import Acceptor, Callbacks, CloseReason, TcpConnection, TcpServer

Handler = Callable[[TcpConnection], Awaitable[None]]
ServeTcp = Callable[..., Awaitable[None]]


def local(handler: Handler | Callbacks, **options: Any) -> TcpServer:
    """A server on a free port of loopback."""
    return TcpServer(handler, 0, host="127.0.0.1", **options)


def balanced(server: TcpServer) -> bool:
    """Promise C, at this moment."""
    now = server.statistics()
    return now.opened - sum(now.closed.values()) == len(server.connections) == now.active


def closed(server: TcpServer) -> dict[CloseReason, int]:
    """The server's ended connections by reason."""
    assert balanced(server)
    return dict(server.statistics().closed)


async def rest_of(client: trio.SocketStream) -> bytes:
    """What still comes until the server closes, however it does that."""
    received = b""
    with trio.fail_after(10):
        with suppress(trio.BrokenResourceError):
            async for chunk in client:
                received += chunk
    return received


async def assert_echoes(client: trio.SocketStream, text: bytes = b"hello") -> None:
    """The server answers this client."""
    with trio.fail_after(10):
        await client.send_all(text)
        received = b""
        while len(received) < len(text):
            chunk = await client.receive_some()
            assert chunk
            received += chunk
    assert received == text


@asynccontextmanager
async def clients(address: Any, count: int) -> AsyncIterator[list[trio.SocketStream]]:
    """So many connected clients, closed at the end."""
    streams = [connect(address) for _ in range(count)]
    try:
        yield streams
    finally:
        # With no checkpoint, so that all are closed when the test is cancelled, too.
        for stream in streams:
            stream.socket.close()


async def silent(conn: TcpConnection) -> None:
    """A handler that does nothing, for ever."""
    await trio.sleep_forever()


async def listens(conn: TcpConnection) -> None:
    """A handler that says nothing and hears of the end."""
    async for _ in conn:
        pass


async def serve_and_keep(
    server: TcpServer,
    outcomes: list[BaseException | None],
    *,
    task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve, and note how that ended: for errors that must come out as they are."""
    try:
        await server.serve(task_status=task_status)
    except BaseException as error:
        outcomes.append(error)
    else:
        outcomes.append(None)


@asynccontextmanager
async def serving_tcp(serve_tcp: ServeTcp, handler: Any, **options: Any) -> AsyncIterator[Any]:
    """`trio.serve_tcp` or ours in the background, on loopback; gives the address."""
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(serve_tcp, handler, 0, host="127.0.0.1", **options))
        yield listeners[0].socket.getsockname()
        nursery.cancel_scope.cancel()


def installed(name: str) -> str:
    """Where a program is. Where it is not, the test is skipped, or fails if it is required."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        if os.environ.get("TRIOREACTOR_REQUIRE_SERVERS") == "1":
            pytest.fail(f"{name} is not installed, and TRIOREACTOR_REQUIRE_SERVERS=1 wants it")
        pytest.skip(f"{name} is not installed")
    return path


@contextmanager
def unused_port() -> Iterator[int]:
    """A port of loopback where nobody listens, and nobody will who is not told of it."""
    with socket.socket() as sock:
        # Bound without listening, it keeps out all but those who set the same option.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@asynccontextmanager
async def server_process(port: int, *command: object) -> AsyncIterator[trio.Process]:
    """A server program, from when it listens on that port of loopback; killed at the end."""
    process = await trio.lowlevel.open_process(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with trio.fail_after(20):
            while True:
                with suppress(OSError):
                    await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                    break
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                await trio.sleep(0.01)
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


class ScriptedListener(socket.socket):
    """A real listening socket on loopback whose `accept` raises what it is told to.

    *script* is a queue of errnos, one for each call; *failing*, while set, is for every call.
    """

    def __init__(self, script: Iterable[int] = ()) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        self.script = deque(script)
        self.failing: int | None = None
        self.accept_calls = 0
        self.bind(("127.0.0.1", 0))
        self.listen(1024)

    def accept(self) -> tuple[socket.socket, Any]:
        self.accept_calls += 1
        number = self.script.popleft() if self.script else self.failing
        if number is not None:
            raise OSError(number, os.strerror(number))
        return super().accept()


def is_running(pid: int) -> bool:
    """Whether that process lives."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    # One that has ended is there until it is asked how.
    return stat.rpartition(")")[2].split()[0] != "Z"


def blocking_client(port: int, *, receive_buffer: int | None = None) -> socket.socket:
    """A client, on loopback, of a server in another process."""
    sock = socket.socket()
    sock.settimeout(30)
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        sock.connect(("127.0.0.1", port))
    except OSError:
        sock.close()
        raise
    return sock
