"""The plain trio peer: `python trio_peer.py streams WORK`."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import trio
from common import (
    BLOCK,
    Answer,
    FramingError,
    answer_frames,
    answer_lines,
    listening_socket,
    main,
    tls_context,
    whole_lines,
    works,
)

Handler = Callable[[Any], Awaitable[object]]


def serve(handler: Handler, context: ssl.SSLContext | None = None) -> None:
    async def guarded(stream: trio.abc.Stream) -> None:
        # What leaves a handler ends the whole server.
        with suppress(trio.BrokenResourceError, FramingError):
            await handler(stream)

    async def serve_listener() -> None:
        listener: trio.abc.Listener[Any] = trio.SocketListener(
            trio.socket.from_stdlib_socket(listening_socket())
        )
        if context is not None:
            listener = trio.SSLListener(listener, context)
        await trio.serve_listeners(guarded, [listener])

    trio.run(serve_listener)


async def echo(stream: trio.abc.Stream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)


async def converse(answer: Answer, stream: trio.SocketStream) -> None:
    rest = b""
    async for chunk in stream:
        answers, rest = answer(rest + chunk)
        if answers:
            await stream.send_all(answers)


async def sink(stream: trio.SocketStream) -> None:
    async for _ in stream:
        pass


async def source(stream: trio.SocketStream) -> None:
    while True:
        await stream.send_all(BLOCK)


# Only one task may send on a stream at one time.
clients: dict[trio.SocketStream, trio.Lock] = {}


async def broadcast(lines: bytes) -> None:
    for stream, lock in list(clients.items()):
        # Sending is a checkpoint; an acquire for each client would be one more.
        try:
            lock.acquire_nowait()
        except trio.WouldBlock:
            await lock.acquire()
        try:
            await stream.send_all(lines)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # Its own task hears of it, too.
            clients.pop(stream, None)
        finally:
            lock.release()


async def chat(stream: trio.SocketStream) -> None:
    clients[stream] = trio.Lock()
    rest = b""
    try:
        async for chunk in stream:
            lines, rest = whole_lines(rest + chunk)
            if lines:
                await broadcast(lines)
    finally:
        clients.pop(stream, None)


if __name__ == "__main__":
    main(
        {
            "streams": {
                **works(
                    serve,
                    echo=echo,
                    lines=partial(converse, answer_lines),
                    framed=partial(converse, answer_frames),
                    sink=sink,
                    source=source,
                    broadcast=chat,
                ),
                "tls": lambda: serve(echo, tls_context()),
            }
        }
    )
