"""The echo servers that are compared, each at its idiomatic best: `python servers.py NAME`.

Prints the port, then serves until it is ended.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import cast

import trio

import trioreactor
from trioreactor import Buffer, Callbacks, TcpConnection, TcpServer


def announce(port: int) -> None:
    """Tell the driver where to connect."""
    print(port, flush=True)


def listening_socket() -> socket.socket:
    """One listening socket on loopback, as every server gets it."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    announce(sock.getsockname()[1])
    return sock


def on_message(conn: TcpConnection, buffer: Buffer) -> None:
    conn.send(buffer.take())


async def echo_send(conn: TcpConnection) -> None:
    async for chunk in conn:
        if not conn.send(chunk):
            await conn.wait_send_all_might_not_block()


async def echo_send_all(conn: TcpConnection) -> None:
    async for chunk in conn:
        await conn.send_all(chunk)


async def echo_stream(stream: trio.SocketStream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)


def serve_trioreactor(handler: Callable[[TcpConnection], Awaitable[object]]) -> None:
    acceptor = trioreactor.Acceptor(listening_socket())
    trio.run(TcpServer(handler, listeners=[acceptor]).serve)


async def serve_plain_trio() -> None:
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening_socket()))
    await trio.serve_listeners(echo_stream, [listener])


class EchoProtocol(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def serve_asyncio_protocol() -> None:
    server = await asyncio.get_running_loop().create_server(EchoProtocol, sock=listening_socket())
    await server.serve_forever()


async def echo_asyncio(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(65536):
        writer.write(chunk)
        await writer.drain()


async def serve_asyncio_streams() -> None:
    server = await asyncio.start_server(echo_asyncio, sock=listening_socket())
    await server.serve_forever()


def on_uvloop(main: Callable[[], Awaitable[None]]) -> None:
    import uvloop

    uvloop.run(main())


SERVERS: dict[str, Callable[[], object]] = {
    "trioreactor dispatch": lambda: serve_trioreactor(Callbacks(message=on_message)),
    "trioreactor send": lambda: serve_trioreactor(echo_send),
    "trioreactor send_all": lambda: serve_trioreactor(echo_send_all),
    "trio serve_tcp": lambda: trio.run(serve_plain_trio),
    "asyncio Protocol": lambda: asyncio.run(serve_asyncio_protocol()),
    "asyncio streams": lambda: asyncio.run(serve_asyncio_streams()),
    "uvloop Protocol": lambda: on_uvloop(serve_asyncio_protocol),
    "uvloop streams": lambda: on_uvloop(serve_asyncio_streams),
}

if __name__ == "__main__":
    SERVERS[sys.argv[1]]()
