"""The AnyIO peer: `python anyio_peer.py trio|asyncio WORK`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import anyio
from anyio.abc import SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream
from common import (
    BACKLOG,
    BLOCK,
    LENGTH,
    MAX_MESSAGE,
    PONG,
    FramingError,
    Works,
    announce,
    main,
    works,
)

Handler = Callable[[SocketStream], Awaitable[object]]

# The client has gone, in the middle of a message or not, or has broken the protocol.
OVER = (
    anyio.BrokenResourceError,
    anyio.EndOfStream,
    anyio.IncompleteRead,
    anyio.DelimiterNotFound,
    FramingError,
)


async def serve_listener(handler: Handler) -> None:
    async def guarded(stream: SocketStream) -> None:
        # What leaves a handler ends the whole server.
        async with stream:
            with suppress(*OVER):
                await handler(stream)

    listener = await anyio.create_tcp_listener(
        local_host="127.0.0.1", local_port=0, backlog=BACKLOG
    )
    announce(listener.extra(SocketAttribute.local_port))
    await listener.serve(guarded)


async def echo(stream: SocketStream) -> None:
    async for chunk in stream:
        await stream.send(chunk)


async def lines(stream: SocketStream) -> None:
    buffered = BufferedByteReceiveStream(stream)
    while True:
        await buffered.receive_until(b"\r\n", MAX_MESSAGE + 2)
        await stream.send(PONG)


async def framed(stream: SocketStream) -> None:
    buffered = BufferedByteReceiveStream(stream)
    while True:
        (size,) = LENGTH.unpack(await buffered.receive_exactly(LENGTH.size))
        if not 0 <= size <= MAX_MESSAGE:
            raise FramingError(f"a frame of {size} bytes")
        message = await buffered.receive_exactly(size)
        await stream.send(LENGTH.pack(len(message)) + message)


async def sink(stream: SocketStream) -> None:
    async for _ in stream:
        pass


async def source(stream: SocketStream) -> None:
    while True:
        await stream.send(BLOCK)


# Only one task may send on a stream at one time.
clients: dict[SocketStream, anyio.Lock] = {}


async def broadcast(line: bytes) -> None:
    for stream, lock in list(clients.items()):
        try:
            async with lock:
                await stream.send(line)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            # Its own task hears of it, too.
            clients.pop(stream, None)


async def chat(stream: SocketStream) -> None:
    clients[stream] = anyio.Lock(fast_acquire=True)
    buffered = BufferedByteReceiveStream(stream)
    try:
        while True:
            line = await buffered.receive_until(b"\n", MAX_MESSAGE + 1)
            await broadcast(line + b"\n")
    finally:
        clients.pop(stream, None)


def works_on(backend: str) -> Works:
    return works(
        partial(anyio.run, serve_listener, backend=backend),
        echo=echo,
        lines=lines,
        framed=framed,
        sink=sink,
        source=source,
        broadcast=chat,
    )


if __name__ == "__main__":
    main({backend: works_on(backend) for backend in ("trio", "asyncio")})
