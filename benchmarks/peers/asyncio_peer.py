"""The asyncio peer: `python asyncio_peer.py [uvloop-]streams|[uvloop-]protocol WORK`."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, cast

from common import (
    BACKLOG,
    BLOCK,
    BROADCAST_LIMIT,
    BURST,
    CHUNK,
    LENGTH,
    MAX_MESSAGE,
    PONG,
    Answer,
    FramingError,
    Works,
    answer_frames,
    answer_lines,
    listening_socket,
    main,
    tls_context,
    whole_lines,
    works,
)

Main = Callable[[], Coroutine[Any, Any, None]]
Run = Callable[[Main], None]
Context = ssl.SSLContext | None


def on_asyncio(serve: Main) -> None:
    asyncio.run(serve())


def on_uvloop(serve: Main) -> None:
    import uvloop

    uvloop.run(serve())


# -- streams

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

# The client has gone, in the middle of a message or not, or has broken the protocol.
OVER = (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, FramingError)


async def serve_streams(handler: Handler, context: Context = None) -> None:
    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except OVER:
            pass
        finally:
            writer.close()

    # Without a backlog it would listen anew, with its own.
    server = await asyncio.start_server(
        guarded, sock=listening_socket(), backlog=BACKLOG, limit=MAX_MESSAGE, ssl=context
    )
    await server.serve_forever()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(CHUNK):
        writer.write(chunk)
        await writer.drain()


async def lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await reader.readuntil(b"\r\n")
        writer.write(PONG)
        await writer.drain()


async def framed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        if not 0 <= size <= MAX_MESSAGE:
            raise FramingError(f"a frame of {size} bytes")
        message = await reader.readexactly(size)
        writer.write(LENGTH.pack(len(message)) + message)
        await writer.drain()


async def sink(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    while await reader.read(CHUNK):
        pass


async def source(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        for _ in range(BURST):
            writer.write(BLOCK)
            await writer.drain()
        await asyncio.sleep(0)


writers: set[asyncio.StreamWriter] = set()


async def chat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writers.add(writer)
    try:
        while True:
            line = await reader.readuntil(b"\n")
            for other in writers:
                # Waiting for one that is slow would make all the others wait, too.
                if other.transport.get_write_buffer_size() > BROADCAST_LIMIT:
                    other.transport.abort()
                elif not other.is_closing():
                    other.write(line)
            # Who sends faster than it reads is slowed down.
            await writer.drain()
    finally:
        writers.discard(writer)


# -- protocols


async def serve_protocol(
    factory: Callable[[], asyncio.BaseProtocol], context: Context = None
) -> None:
    loop = asyncio.get_running_loop()
    # Without a backlog it would listen anew, with its own.
    server = await loop.create_server(
        factory, sock=listening_socket(), backlog=BACKLOG, ssl=context
    )
    await server.serve_forever()


class Echo(asyncio.Protocol):
    """Reads no more from a client that does not read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


class Conversation(Echo):
    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.rest = b""

    def data_received(self, data: bytes) -> None:
        if self.rest:
            data = self.rest + data
        try:
            answers, self.rest = self.answer(data)
        except FramingError:
            self.transport.abort()
            return
        if answers:
            self.send(answers)

    def send(self, answers: bytes) -> None:
        self.transport.write(answers)


class Sink(asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        pass


class Source(Echo):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.paused = False
        self.produce()

    def produce(self) -> None:
        for _ in range(BURST):
            if self.paused or self.transport.is_closing():
                return
            self.transport.write(BLOCK)
        if not self.paused:
            asyncio.get_running_loop().call_soon(self.produce)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.produce()


transports: set[asyncio.Transport] = set()


class Chat(Conversation):
    def __init__(self) -> None:
        super().__init__(whole_lines)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        transports.add(self.transport)

    def connection_lost(self, _error: Exception | None) -> None:
        transports.discard(self.transport)

    def send(self, answers: bytes) -> None:
        for transport in transports:
            if transport.get_write_buffer_size() > BROADCAST_LIMIT:
                transport.abort()
            elif not transport.is_closing():
                transport.write(answers)


def stream_works(run: Run) -> Works:
    return {
        **works(
            lambda handler: run(partial(serve_streams, handler)),
            echo=echo,
            lines=lines,
            framed=framed,
            sink=sink,
            source=source,
            broadcast=chat,
        ),
        "tls": lambda: run(partial(serve_streams, echo, tls_context())),
    }


def protocol_works(run: Run) -> Works:
    return {
        **works(
            lambda factory: run(partial(serve_protocol, factory)),
            echo=Echo,
            lines=partial(Conversation, answer_lines),
            framed=partial(Conversation, answer_frames),
            sink=Sink,
            source=Source,
            broadcast=Chat,
        ),
        "tls": lambda: run(partial(serve_protocol, Echo, tls_context())),
    }


if __name__ == "__main__":
    main(
        {
            "streams": stream_works(on_asyncio),
            "protocol": protocol_works(on_asyncio),
            "uvloop-streams": stream_works(on_uvloop),
            "uvloop-protocol": protocol_works(on_uvloop),
        }
    )
