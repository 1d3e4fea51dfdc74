"""The EasyNetwork peer: `python easynetwork_peer.py trio|asyncio WORK`.

It is not tried on uvloop.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any, Literal

from common import BACKLOG, BLOCK, BURST, CHUNK, LENGTH, MAX_MESSAGE, Works, announce, main
from easynetwork.exceptions import (
    ClientClosedError,
    IncrementalDeserializeError,
    StreamProtocolParseError,
)
from easynetwork.protocol import StreamProtocol
from easynetwork.serializers import StringLineSerializer
from easynetwork.serializers.abc import AbstractIncrementalPacketSerializer
from easynetwork.serializers.tools import GeneratorStreamReader
from easynetwork.servers.async_tcp import AsyncTCPNetworkServer
from easynetwork.servers.handlers import AsyncStreamClient, AsyncStreamRequestHandler

Backend = Literal["trio", "asyncio"]
Serializer = AbstractIncrementalPacketSerializer[Any, Any]


class Chunks(AbstractIncrementalPacketSerializer[bytes, bytes]):
    """What came together is a packet."""

    def incremental_serialize(self, packet: bytes) -> Generator[bytes]:
        yield packet

    def incremental_deserialize(self) -> Generator[None, bytes, tuple[bytes, bytes]]:
        return (yield), b""


class Frames(AbstractIncrementalPacketSerializer[bytes, bytes]):
    def incremental_serialize(self, packet: bytes) -> Generator[bytes]:
        yield LENGTH.pack(len(packet)) + packet

    def incremental_deserialize(self) -> Generator[None, bytes, tuple[bytes, bytes]]:
        reader = GeneratorStreamReader()
        header = yield from reader.read_exactly(LENGTH.size)
        (size,) = LENGTH.unpack(header)
        if not 0 <= size <= MAX_MESSAGE:
            raise IncrementalDeserializeError(f"a frame of {size} bytes", reader.read_all())
        message = yield from reader.read_exactly(size)
        return message, reader.read_all()


# Here asyncio's writelines, by which EasyNetwork sends, tells nobody that the send buffer is full.
UNPACED = (3, 12) <= sys.version_info < (3, 12, 9) or (3, 13) <= sys.version_info < (3, 13, 2)

# The client has gone. The last two are asyncio's, where a connection is lost and it has not said so
# (gh-136234).
GONE = (ClientClosedError, ConnectionError, AttributeError, TypeError)

# In an encoding that has a character for every byte.
requests = StringLineSerializer("CRLF", encoding="latin-1", limit=MAX_MESSAGE)
news = StringLineSerializer("LF", encoding="latin-1", limit=MAX_MESSAGE, keep_end=True)


class Echo(AsyncStreamRequestHandler[Any, Any]):
    async def handle(self, client: AsyncStreamClient[Any]) -> AsyncGenerator[None, Any]:
        try:
            while True:
                packet = yield
                await self.received(client, packet)
        except StreamProtocolParseError:
            await client.aclose()

    async def received(self, client: AsyncStreamClient[Any], packet: Any) -> None:
        await client.send_packet(packet)


class Lines(Echo):
    async def received(self, client: AsyncStreamClient[str], _packet: str) -> None:
        await client.send_packet("+PONG")


class Sink(Echo):
    async def received(self, _client: AsyncStreamClient[bytes], _packet: bytes) -> None:
        pass


class Source(Sink):
    async def on_connection(self, client: AsyncStreamClient[bytes]) -> None:
        while True:
            for _ in range(BURST):
                await client.send_packet(BLOCK)
            await client.backend().coro_yield()


class Chat(Echo):
    def __init__(self) -> None:
        self.clients: set[AsyncStreamClient[str]] = set()

    async def on_connection(self, client: AsyncStreamClient[str]) -> None:
        self.clients.add(client)

    async def on_disconnection(self, client: AsyncStreamClient[str]) -> None:
        self.clients.discard(client)

    async def received(self, _client: AsyncStreamClient[str], packet: str) -> None:
        for client in list(self.clients):
            try:
                await client.send_packet(packet)
            except GONE:
                # Its own task hears of it, too.
                self.clients.discard(client)


async def serve_on(backend: Backend, serializer: Serializer, handler: Echo) -> None:
    server = AsyncTCPNetworkServer(
        "127.0.0.1",
        0,
        StreamProtocol(serializer),
        handler,
        backend,
        backlog=BACKLOG,
        max_recv_size=CHUNK,
        log_client_connection=False,
    )
    async with server:
        await server.server_activate()
        announce(server.get_addresses()[0].port)
        await server.serve_forever()


def run(backend: Backend, serializer: Serializer, handler: Echo) -> None:
    if backend == "asyncio":
        asyncio.run(serve_on(backend, serializer, handler))
    else:
        import trio

        trio.run(serve_on, backend, serializer, handler)


def works(backend: Backend) -> Works:
    def serve(serializer: Serializer, handler: type[Echo]) -> Callable[[], None]:
        if handler is Source and backend == "asyncio" and UNPACED:
            return leave_out
        return lambda: run(backend, serializer, handler())

    def leave_out() -> None:
        raise SystemExit("left out: this Python's asyncio does not pace writelines (gh-127655)")

    return {
        "echo": serve(Chunks(), Echo),
        "lines": serve(requests, Lines),
        "framed": serve(Frames(), Echo),
        "sink": serve(Chunks(), Sink),
        "source": serve(Chunks(), Source),
        "broadcast": serve(news, Chat),
    }


if __name__ == "__main__":
    main({"trio": works("trio"), "asyncio": works("asyncio")})
