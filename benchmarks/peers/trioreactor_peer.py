"""The trioreactor peer: `python trioreactor_peer.py dispatch|send|send_all WORK`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio
from common import (
    BLOCK,
    BROADCAST_LIMIT,
    BURST,
    MAX_MESSAGE,
    answer_lines,
    listening_socket,
    main,
    tls_context,
)

from trioreactor import (
    Acceptor,
    Buffer,
    Callbacks,
    ConnectionState,
    FramedChannel,
    LengthHeaderCodec,
    LineCodec,
    TcpConnection,
    TcpServer,
    Watermarks,
)

Handler = Callable[[TcpConnection], Awaitable[object]]

requests = LineCodec(None, ending="\r\n", max_frame=MAX_MESSAGE)
frames = LengthHeaderCodec(max_frame=MAX_MESSAGE)
news = LineCodec(None, ending="\n", max_frame=MAX_MESSAGE)


def new_server(handler: Handler, *, limit: int | None = None, **options: Any) -> TcpServer:
    acceptor = Acceptor(listening_socket())
    watermarks = Watermarks() if limit is None else Watermarks(limit=limit)
    return TcpServer(handler, listeners=[acceptor], watermarks=watermarks, **options)


def serve(handler: Handler) -> Callable[[], None]:
    return lambda: trio.run(new_server(handler).serve)


def serve_tls(handler: Handler) -> Callable[[], None]:
    return lambda: trio.run(new_server(handler, ssl_context=tls_context()).serve)


def serve_broadcast(make_handler: Callable[[Callable[[bytes], object]], Handler]) -> None:
    def broadcast(line: bytes) -> None:
        server.broadcast(news.encode(line))

    server = new_server(make_handler(broadcast), limit=BROADCAST_LIMIT)
    trio.run(server.serve)


# -- callbacks


def read_on(conn: TcpConnection, _size: int) -> None:
    conn.start_reading()


def send_back(conn: TcpConnection, buffer: Buffer) -> None:
    if not conn.send(buffer.take()):
        conn.stop_reading()


def answer(conn: TcpConnection, buffer: Buffer) -> None:
    # As in the protocols of the others: a codec would call for each line.
    answers, rest = answer_lines(buffer.take())
    if rest:
        buffer.append(rest)
    if not conn.send(answers):
        conn.stop_reading()


def send_back_frame(conn: TcpConnection, message: bytes) -> None:
    if not conn.send(frames.encode(message)):
        conn.stop_reading()


def throw_away(_conn: TcpConnection, buffer: Buffer) -> None:
    buffer.discard(len(buffer))


def begin(conn: TcpConnection) -> None:
    if conn.state is ConnectionState.CONNECTED:
        send_more(conn)


def send_more(conn: TcpConnection) -> None:
    for _ in range(BURST):
        if not conn.send(BLOCK):
            break


def dispatch_broadcast(broadcast: Callable[[bytes], object]) -> Handler:
    def on_line(conn: TcpConnection, line: bytes) -> None:
        broadcast(line)
        # Who sends faster than it reads is slowed down.
        if conn.congested:
            conn.stop_reading()

    return Callbacks(message=news.on_message(on_line), low_water_mark=read_on)


# -- coroutines


async def echo_send(conn: TcpConnection) -> None:
    async for chunk in conn:
        if not conn.send(chunk):
            await conn.wait_send_all_might_not_block()


async def echo_send_all(conn: TcpConnection) -> None:
    async for chunk in conn:
        await conn.send_all(chunk)


async def answer_send(conn: TcpConnection) -> None:
    channel = FramedChannel(conn, requests)
    async for _line in channel:
        if not channel.send_nowait(b"+PONG"):
            await conn.wait_uncongested()


async def answer_send_all(conn: TcpConnection) -> None:
    channel = FramedChannel(conn, requests)
    async for _line in channel:
        await channel.send(b"+PONG")


async def frames_send(conn: TcpConnection) -> None:
    channel = FramedChannel(conn, frames)
    async for message in channel:
        if not channel.send_nowait(message):
            await conn.wait_uncongested()


async def frames_send_all(conn: TcpConnection) -> None:
    channel = FramedChannel(conn, frames)
    async for message in channel:
        await channel.send(message)


async def sink(conn: TcpConnection) -> None:
    async for _ in conn:
        pass


async def source_send(conn: TcpConnection) -> None:
    while True:
        send_more(conn)
        # Also where there is room: it gives the others their turn.
        await conn.wait_send_all_might_not_block()


async def source_send_all(conn: TcpConnection) -> None:
    while True:
        await conn.send_all(BLOCK)


def channel_broadcast(broadcast: Callable[[bytes], object]) -> Handler:
    async def handler(conn: TcpConnection) -> None:
        async for line in FramedChannel(conn, news):
            broadcast(line)
            # Who sends faster than it reads is slowed down.
            if conn.congested:
                await conn.wait_uncongested()

    return handler


if __name__ == "__main__":
    main(
        {
            "dispatch": {
                "echo": serve(Callbacks(message=send_back, low_water_mark=read_on)),
                "tls": serve_tls(Callbacks(message=send_back, low_water_mark=read_on)),
                "lines": serve(Callbacks(message=answer, low_water_mark=read_on)),
                "framed": serve(
                    Callbacks(message=frames.on_message(send_back_frame), low_water_mark=read_on)
                ),
                "sink": serve(Callbacks(message=throw_away)),
                "source": serve(
                    Callbacks(connection=begin, message=throw_away, write_complete=send_more)
                ),
                "broadcast": lambda: serve_broadcast(dispatch_broadcast),
            },
            "send": {
                "echo": serve(echo_send),
                "tls": serve_tls(echo_send),
                "lines": serve(answer_send),
                "framed": serve(frames_send),
                "sink": serve(sink),
                "source": serve(source_send),
                "broadcast": lambda: serve_broadcast(channel_broadcast),
            },
            "send_all": {
                "echo": serve(echo_send_all),
                "tls": serve_tls(echo_send_all),
                "lines": serve(answer_send_all),
                "framed": serve(frames_send_all),
                "sink": serve(sink),
                "source": serve(source_send_all),
                "broadcast": lambda: serve_broadcast(channel_broadcast),
            },
        }
    )
