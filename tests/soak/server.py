"""The servers under test, each an echo server in a process of its own.

``python -m tests.soak.server KIND [OPTIONS]`` first answers with its port. The trioreactor kinds
("coroutine" and "dispatch", "channel" and "messages", which echo messages, with OPTIONS a JSON
object for `Watermarks`, `Timeouts` and `SocketOptions`, ``"tls": true`` for TLS, and "watchdog")
obey the commands of `Control`; the others ("trio", "asyncio streams", "asyncio Protocol") only
serve.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import logging
import os
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from tests.tls import server_context
from trioreactor import (
    Buffer,
    Callbacks,
    FramedChannel,
    LengthHeaderCodec,
    SocketOptions,
    TcpConnection,
    TcpServer,
    Timeouts,
    Watermarks,
)

Handler = Callable[[TcpConnection], Awaitable[object]]

HOST = "127.0.0.1"

# What a broadcast message begins with: when it was sent, by the clock that processes share, and
# its number.
HEAD = struct.Struct("dI")
MESSAGE_SIZE = 1024


def answer(value: Any) -> None:
    """One line for the parent."""
    print(json.dumps(value), flush=True)


# -- trioreactor


async def coroutine(conn: TcpConnection) -> None:
    """Echo."""
    async for chunk in conn:
        await conn.send_all(chunk)


def on_message(conn: TcpConnection, buffer: Buffer) -> None:
    """Echo."""
    conn.send(buffer.take())


CODEC = LengthHeaderCodec()
# Of such messages a burst may have a million; what is no news is answered.
NEWS = b"x"


async def channel(conn: TcpConnection) -> None:
    """Echo, of messages."""
    messages = FramedChannel(conn, CODEC)
    async for message in messages:
        if message != NEWS:
            await messages.send(message)


def on_framed_message(conn: TcpConnection, message: bytes) -> None:
    """Echo, of messages."""
    if message != NEWS:
        conn.send(CODEC.encode(message))


KINDS: dict[str, Handler] = {
    "coroutine": coroutine,
    "dispatch": Callbacks(message=on_message),
    "channel": channel,
    "messages": Callbacks(message=CODEC.on_message(on_framed_message)),
}


class Warnings(logging.Handler):
    """Keeps what was logged as a warning or worse, but for who held the loop: `counts` does, where
    the garbage of thousands of connections is collected.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        if record.name != "trioreactor.watchdog":
            self.texts.append(record.getMessage())


class Collector:
    """How many seconds the garbage collector takes, in all and at the most."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.longest = 0.0
        self._begun = 0.0
        gc.callbacks.append(self._phase)

    def _phase(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._begun = time.monotonic()
        else:
            taken = time.monotonic() - self._begun
            self.seconds += taken
            self.longest = max(self.longest, taken)


class Control:
    """The commands."""

    def __init__(self, server: TcpServer, nursery: trio.Nursery) -> None:
        self._server = server
        self._nursery = nursery
        self._warnings = Warnings()
        logging.getLogger("trioreactor").addHandler(self._warnings)
        self._messages = 0
        self._collector = Collector()
        # While `watch` runs, and then its result in seconds.
        self._watching = trio.CancelScope()
        self._longest_absence = 0.0

    async def counts(self) -> dict[str, Any]:
        """Everything that must come back to where it was, and the server's own counters."""
        gc.collect()
        statistics = self._server.statistics()
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "connections": len(self._server.connections),
            "buffered": statistics.buffered,
            "blocks": sys.getallocatedblocks(),
            "warnings": self._warnings.texts[:3],
            "opened": statistics.opened,
            "closed": {reason.name: n for reason, n in statistics.closed.items()},
            "pauses": statistics.pauses,
        }

    async def wait_connections(self, number: int) -> bool:
        """Wait until there are so many connections. False if that takes more than a minute."""
        with trio.move_on_after(60):
            while len(self._server.connections) != number:
                await trio.sleep(0.01)
            return True
        return False

    async def watch(self) -> None:
        """Begin to watch how late the loop comes to a task that wants its turn."""
        self._nursery.start_soon(self._watch)

    async def _watch(self) -> None:
        self._longest_absence = self._collector.longest = 0.0
        with trio.CancelScope() as self._watching:
            while True:
                wanted = trio.current_time() + 0.005
                collecting = self._collector.seconds
                await trio.sleep_until(wanted)
                late = trio.current_time() - wanted - (self._collector.seconds - collecting)
                self._longest_absence = max(self._longest_absence, late)

    async def longest_absence(self) -> tuple[float, float]:
        """End the watch. The longest that it was, without the garbage collector's part, and the
        longest that the collector took, in seconds.
        """
        self._watching.cancel()
        return self._longest_absence, self._collector.longest

    async def broadcast(self, most: int, until: int, interval: float = 0.0) -> int:
        """Broadcast a message every *interval* seconds, at most *most*, heeding nothing, until
        only *until* connections are left. How many it were.
        """
        begun = trio.current_time()
        for n in range(most):
            if len(self._server.connections) <= until:
                return n
            await trio.sleep_until(begun + n * interval)
            self._server.broadcast(self._message())
        return most

    async def flood(self, most: int, until: int) -> int:
        """As `broadcast`, as fast as it goes, but each connection gets a message of its own, so
        that no two share memory.
        """
        for n in range(most):
            if len(self._server.connections) <= until:
                return n
            for conn in list(self._server.connections.values()):
                self._server.broadcast(self._message(), to=[conn])
            await trio.lowlevel.checkpoint()
        return most

    def _message(self) -> bytes:
        self._messages += 1
        return HEAD.pack(time.monotonic(), self._messages).ljust(MESSAGE_SIZE, b".")


async def serve_trioreactor(kind: str, options: dict[str, Any]) -> None:
    """Serve, and obey until the end of the input."""
    server = TcpServer(
        KINDS[kind],
        0,
        host=HOST,
        watermarks=Watermarks(**options.get("watermarks", {})),
        timeouts=Timeouts(**options.get("timeouts", {})),
        socket_options=SocketOptions(**options.get("socket_options", {})),
        ssl_context=server_context() if options.get("tls") else None,
        watchdog=options.get("watchdog", 0.1),
    )
    async with trio.open_nursery() as nursery, trio.lowlevel.FdStream(os.dup(0)) as commands:
        (acceptor,) = await nursery.start(server.serve)
        answer(acceptor.address[1])
        control = Control(server, nursery)
        # By a dictionary, for a look-up of an attribute would keep each command's name for ever.
        methods = {name: getattr(control, name) for name in dir(control)}
        # The parent waits for each answer, so a chunk is one command.
        async for line in commands:
            name, *arguments = json.loads(line)
            answer(await methods[name](*arguments))
        server.close()


# -- what it is compared with


async def serve_trio() -> None:
    """trio alone."""

    async def echo(stream: trio.SocketStream) -> None:
        async for chunk in stream:
            await stream.send_all(chunk)

    async with trio.open_nursery() as nursery, trio.lowlevel.FdStream(os.dup(0)) as commands:
        (listener,) = await nursery.start(functools.partial(trio.serve_tcp, echo, 0, host=HOST))
        answer(listener.socket.getsockname()[1])
        await commands.receive_some()
        nursery.cancel_scope.cancel()


async def serve_asyncio(kind: str) -> None:
    """asyncio, by streams or by a Protocol."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    class Echo(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

    loop = asyncio.get_running_loop()
    if kind == "asyncio streams":
        server = await asyncio.start_server(echo, HOST, 0)
    else:
        server = await loop.create_server(Echo, HOST, 0)
    answer(server.sockets[0].getsockname()[1])
    ended = asyncio.Event()
    loop.add_reader(0, ended.set)
    await ended.wait()
    server.close()


def main(kind: str, options: str = "{}") -> None:
    """Serve until the end of the input."""
    if kind == "trio":
        trio.run(serve_trio)
    elif kind.startswith("asyncio"):
        asyncio.run(serve_asyncio(kind))
    else:
        trio.run(serve_trioreactor, kind, json.loads(options))


if __name__ == "__main__":
    main(*sys.argv[1:])
