"""The Tornado peer: `python tornado_peer.py iostream WORK`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from common import (
    BLOCK,
    BROADCAST_LIMIT,
    BURST,
    CHUNK,
    LENGTH,
    MAX_MESSAGE,
    PONG,
    FramingError,
    listening_socket,
    main,
    works,
)
from tornado.iostream import IOStream, StreamBufferFullError, StreamClosedError
from tornado.tcpserver import TCPServer

Handler = Callable[[IOStream], Awaitable[object]]


class Server(TCPServer):
    def __init__(self, handler: Handler) -> None:
        super().__init__()
        self.handler = handler

    async def handle_stream(self, stream: IOStream, address: Any) -> None:
        try:
            await self.handler(stream)
        except (StreamClosedError, FramingError):
            pass
        finally:
            stream.close()


def serve(handler: Handler) -> None:
    async def serve_socket() -> None:
        sock = listening_socket()
        sock.setblocking(False)
        Server(handler).add_socket(sock)
        await asyncio.Event().wait()

    asyncio.run(serve_socket())


async def echo(stream: IOStream) -> None:
    while True:
        await stream.write(await stream.read_bytes(CHUNK, partial=True))


async def lines(stream: IOStream) -> None:
    while True:
        await stream.read_until(b"\r\n", max_bytes=MAX_MESSAGE + 2)
        await stream.write(PONG)


async def framed(stream: IOStream) -> None:
    while True:
        (size,) = LENGTH.unpack(await stream.read_bytes(LENGTH.size))
        if not 0 <= size <= MAX_MESSAGE:
            raise FramingError(f"a frame of {size} bytes")
        message = await stream.read_bytes(size)
        await stream.write(LENGTH.pack(len(message)) + message)


async def sink(stream: IOStream) -> None:
    scratch = bytearray(CHUNK)
    while True:
        for _ in range(BURST):
            await stream.read_into(scratch, partial=True)
        await asyncio.sleep(0)


async def source(stream: IOStream) -> None:
    while True:
        for _ in range(BURST):
            await stream.write(BLOCK)
        await asyncio.sleep(0)


clients: set[IOStream] = set()


async def chat(stream: IOStream) -> None:
    stream.max_write_buffer_size = BROADCAST_LIMIT
    clients.add(stream)
    try:
        while True:
            line = await stream.read_until(b"\n", max_bytes=MAX_MESSAGE + 1)
            for other in list(clients):
                if other is not stream:
                    tell(other, line)
            # Who sends faster than it reads is slowed down.
            await stream.write(line)
    finally:
        clients.discard(stream)


def tell(stream: IOStream, line: bytes) -> None:
    """Waiting for one that is slow would make all the others wait, too."""
    try:
        stream.write(line)
    except StreamClosedError:
        # Its own task hears of it, too.
        clients.discard(stream)
    except StreamBufferFullError:
        stream.close()


if __name__ == "__main__":
    main(
        {
            "iostream": works(
                serve,
                echo=echo,
                lines=lines,
                framed=framed,
                sink=sink,
                source=source,
                broadcast=chat,
            )
        }
    )
