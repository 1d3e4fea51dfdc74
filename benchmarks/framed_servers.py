"""The framed echo servers that are compared: `python framed_servers.py NAME`.

Each sends back messages behind a length of four bytes, and refuses those of more than 64 KiB. Each
is written as its library's documentation would have it, and at its best in that. Prints the port,
then serves until it is ended.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from functools import partial
from typing import Any, Literal, cast

from servers import announce, listening_socket, on_uvloop, serve_trioreactor

from trioreactor import Callbacks, FramedChannel, LengthHeaderCodec, TcpConnection

LENGTH = struct.Struct(">i")
MAX_FRAME = 65536

codec = LengthHeaderCodec(max_frame=MAX_FRAME)


def on_message(conn: TcpConnection, message: bytes) -> None:
    conn.send(codec.encode(message))


async def echo_channel(conn: TcpConnection) -> None:
    channel = FramedChannel(conn, codec)
    async for message in channel:
        await channel.send(message)


# -- asyncio, on its own loop and on uvloop


async def echo_readexactly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            header = await reader.readexactly(LENGTH.size)
            (size,) = LENGTH.unpack(header)
            if not 0 <= size <= MAX_FRAME:
                raise ValueError(f"a frame of {size} bytes")
            message = await reader.readexactly(size)
            writer.write(LENGTH.pack(len(message)) + message)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def serve_asyncio_streams() -> None:
    server = await asyncio.start_server(echo_readexactly, sock=listening_socket())
    await server.serve_forever()


class FramedEchoProtocol(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self.transport = cast(asyncio.Transport, transport)
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        if self.buffer:
            data = self.buffer + data
        answers: list[bytes] = []
        start, end = 0, len(data)
        while end - start >= LENGTH.size:
            (size,) = LENGTH.unpack_from(data, start)
            if not 0 <= size <= MAX_FRAME:
                self.transport.abort()
                return
            stop = start + LENGTH.size + size
            if stop > end:
                break
            message = data[start + LENGTH.size : stop]
            answers.append(LENGTH.pack(len(message)) + message)
            start = stop
        self.buffer = data[start:]
        if answers:
            self.transport.write(b"".join(answers))

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


async def serve_asyncio_protocol() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(FramedEchoProtocol, sock=listening_socket())
    await server.serve_forever()


# -- the others


def serve_twisted() -> None:
    from twisted.internet import reactor
    from twisted.internet.protocol import ServerFactory
    from twisted.protocols.basic import Int32StringReceiver

    class Echo(Int32StringReceiver):  # type: ignore[misc, unused-ignore]
        MAX_LENGTH = MAX_FRAME

        def connectionMade(self) -> None:  # noqa: N802 Twisted's name
            self.transport.setTcpNoDelay(True)

        def stringReceived(self, string: bytes) -> None:  # noqa: N802 Twisted's name
            self.sendString(string)

    loop = cast(Any, reactor)
    port = loop.listenTCP(0, ServerFactory.forProtocol(Echo), backlog=4096, interface="127.0.0.1")
    announce(port.getHost().port)
    loop.run()


async def serve_easynetwork(backend: Literal["asyncio", "trio"]) -> None:
    from easynetwork.exceptions import IncrementalDeserializeError
    from easynetwork.protocol import StreamProtocol
    from easynetwork.serializers.abc import AbstractIncrementalPacketSerializer
    from easynetwork.serializers.tools import GeneratorStreamReader
    from easynetwork.servers.async_tcp import AsyncTCPNetworkServer
    from easynetwork.servers.handlers import AsyncStreamClient, AsyncStreamRequestHandler

    class Serializer(AbstractIncrementalPacketSerializer[bytes, bytes]):
        def incremental_serialize(self, packet: bytes) -> Generator[bytes]:
            yield LENGTH.pack(len(packet)) + packet

        def incremental_deserialize(self) -> Generator[None, bytes, tuple[bytes, bytes]]:
            reader = GeneratorStreamReader()
            header = yield from reader.read_exactly(LENGTH.size)
            (size,) = LENGTH.unpack(header)
            if not 0 <= size <= MAX_FRAME:
                raise IncrementalDeserializeError(f"a frame of {size} bytes", reader.read_all())
            message = yield from reader.read_exactly(size)
            return message, reader.read_all()

    class Echo(AsyncStreamRequestHandler[bytes, bytes]):
        async def handle(self, client: AsyncStreamClient[bytes]) -> AsyncGenerator[None, bytes]:
            while True:
                message = yield
                await client.send_packet(message)

    server = AsyncTCPNetworkServer(
        "127.0.0.1",
        0,
        StreamProtocol(Serializer()),
        Echo(),
        backend,
        backlog=4096,
        log_client_connection=False,
    )
    async with server:
        await server.server_activate()
        announce(server.get_addresses()[0].port)
        await server.serve_forever()


def serve_easynetwork_on_trio() -> None:
    import trio

    trio.run(serve_easynetwork, "trio")


SERVERS: dict[str, Callable[[], object]] = {
    "trioreactor dispatch": lambda: serve_trioreactor(
        Callbacks(message=codec.on_message(on_message))
    ),
    "trioreactor channel": lambda: serve_trioreactor(echo_channel),
    "asyncio readexactly": lambda: asyncio.run(serve_asyncio_streams()),
    "asyncio Protocol": lambda: asyncio.run(serve_asyncio_protocol()),
    "uvloop readexactly": lambda: on_uvloop(serve_asyncio_streams),
    "uvloop Protocol": lambda: on_uvloop(serve_asyncio_protocol),
    "Twisted": serve_twisted,
    "EasyNetwork asyncio": lambda: asyncio.run(serve_easynetwork("asyncio")),
    "EasyNetwork uvloop": lambda: on_uvloop(partial(serve_easynetwork, "asyncio")),
    "EasyNetwork trio": serve_easynetwork_on_trio,
}

if __name__ == "__main__":
    SERVERS[sys.argv[1]]()
