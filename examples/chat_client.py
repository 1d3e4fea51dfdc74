"""The chat for a terminal: what you type is sent to the room, and what is said there is shown. When
the server has gone, also without a word, it is looked for until it is back, and what you type
waits. At the end of the input it leaves the room.

    python examples/chat.py --port 7023
    python examples/chat_client.py --port 7023 --name ann      in several terminals
"""

import argparse
import os
from collections.abc import Awaitable, Callable
from functools import partial

import trio
from chat import CODEC

from trioreactor import (
    NEED_MORE,
    Backoff,
    Buffer,
    Heartbeat,
    LineCodec,
    TcpClient,
    TcpConnection,
    dispatch_messages,
)

# The server answers an empty message, and closes those that it hears nothing of.
HEARTBEAT = Heartbeat(ping=b"", is_pong=lambda message: not message, interval=10, timeout=30)
BACKOFF = Backoff(initial=0.25, maximum=5, reset_after=5)
LINES = LineCodec(None, max_frame=8192)

say = partial(print, flush=True)


async def read_lines(source: int, send: Callable[[bytes], Awaitable[None]]) -> None:
    """Pass on the lines that come from a descriptor: a terminal's, a pipe's or a file's."""
    buffer = Buffer()
    # In a thread, for epoll takes no files, and a terminal that does not block would be so for
    # what we print, too.
    while data := await trio.to_thread.run_sync(os.read, source, 4096, abandon_on_cancel=True):
        buffer.append(data)
        while (line := LINES.decode(buffer)) is not NEED_MORE:
            await send(line)
    if len(buffer):
        await send(buffer.take())


async def main(
    port: int,
    name: str,
    source: int = 0,
    *,
    heartbeat: Heartbeat[bytes] = HEARTBEAT,
    backoff: Backoff = BACKOFF,
) -> None:
    def show(_conn: TcpConnection, message: bytes) -> None:
        # No control characters, or one user could repaint the others' terminals.
        say("".join(filter(str.isprintable, message.decode("utf-8", "replace"))))

    async def handler(conn: TcpConnection) -> None:
        say("! connected")
        try:
            await dispatch_messages(conn, CODEC, show, heartbeat=heartbeat)
        finally:
            say("! disconnected")

    async def send(line: bytes) -> None:
        conn = await client.wait_connected()
        try:
            await conn.send_all(CODEC.encode(b"%s: %s" % (name.encode(), line)))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            say("! your last line may be lost")

    async with TcpClient("127.0.0.1", port, handler, backoff=backoff) as client:
        await read_lines(source, send)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7023)
    parser.add_argument("--name", default=f"guest{os.getpid()}")
    args = parser.parse_args()
    try:
        trio.run(main, args.port, args.name)
    except* KeyboardInterrupt:
        pass
