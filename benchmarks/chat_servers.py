"""The chat servers that are compared: `python chat_servers.py NAME`.

What one client sends, a message behind a length of four bytes, all of them are sent. A client that
does not read is closed when LIMIT bytes wait for it, and delays nobody. Prints the port, then
serves until it is ended.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from collections.abc import Callable

import trio
from peers.common import listening_socket

from trioreactor import (
    Acceptor,
    Callbacks,
    LengthHeaderCodec,
    TcpConnection,
    TcpServer,
    Watermarks,
)

LENGTH = struct.Struct(">i")
MAX_FRAME = 65536
LIMIT = 2**20


def serve_trioreactor() -> None:
    codec = LengthHeaderCodec(max_frame=MAX_FRAME)

    def on_message(_conn: TcpConnection, message: bytes) -> None:
        server.broadcast(codec.encode(message))

    server = TcpServer(
        Callbacks(message=codec.on_message(on_message)),
        listeners=[Acceptor(listening_socket())],
        watermarks=Watermarks(high=65536, low=16384, limit=LIMIT),
    )
    trio.run(server.serve)


clients: set[asyncio.StreamWriter] = set()


def broadcast(frame: bytes) -> None:
    for writer in clients:
        # Waiting for one that is slow would make all the others wait, too.
        if writer.transport.get_write_buffer_size() > LIMIT:
            writer.transport.abort()
        else:
            writer.write(frame)


async def chat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    clients.add(writer)
    try:
        while True:
            header = await reader.readexactly(LENGTH.size)
            (size,) = LENGTH.unpack(header)
            if not 0 <= size <= MAX_FRAME:
                raise ValueError(f"a frame of {size} bytes")
            message = await reader.readexactly(size)
            broadcast(header + message)
            # Who sends faster than it reads is slowed down.
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        clients.discard(writer)
        writer.close()


async def serve_asyncio() -> None:
    server = await asyncio.start_server(chat, sock=listening_socket())
    await server.serve_forever()


def on_uvloop() -> None:
    import uvloop

    uvloop.run(serve_asyncio())


SERVERS: dict[str, Callable[[], object]] = {
    "trioreactor": serve_trioreactor,
    "asyncio streams": lambda: asyncio.run(serve_asyncio()),
    "uvloop streams": on_uvloop,
}

if __name__ == "__main__":
    SERVERS[sys.argv[1]]()
