r"""A small memcached: values by key, for a time, over the text protocol that its clients speak. One
whose input no longer shows where the next request begins (a line without an end, too large a value)
is told so and closed. One who asks for much and reads nothing costs us one value and the mark.

    python examples/memcached.py --port 11211
    printf 'set k 0 0 5\r\nhello\r\nget k\r\n' | nc 127.0.0.1 11211
"""

import argparse
from typing import NamedTuple

import trio
from parts.memcached_items import Items, Leaving, number

from trioreactor import (
    NEED_MORE,
    Acceptor,
    Buffer,
    Codec,
    FrameTooLarge,
    NeedMore,
    ProtocolError,
    TcpConnection,
    TcpServer,
    Watermarks,
    format_address,
    open_tcp_acceptors,
)

STORING = (b"set", b"add", b"replace", b"cas")
MAX_LINE, MAX_VALUE = 65536, 1 << 20  # a line may name many keys
WATERMARKS = Watermarks(receive_limit=2 * (MAX_LINE + MAX_VALUE))


class Request(NamedTuple):
    """A line's words, and the block if one follows."""

    words: list[bytes]
    value: bytes = b""


class TextCodec(Codec[Request]):
    """A line; and, where that stores something, a block of as many bytes as it says."""

    def decode(self, buffer: Buffer) -> Request | NeedMore:
        """The next request, if all of it is there."""
        end = buffer.find(b"\n")
        if (end if end >= 0 else len(buffer)) > MAX_LINE:
            raise FrameTooLarge("line too long")
        if end < 0:
            return NEED_MORE
        words = buffer.peek(end).split()
        if not words or words[0] not in STORING:
            buffer.discard(end + 1)
            return Request(words)
        if len(words) < 5 or (size := number(words[4])) is None:
            raise ProtocolError("bad command line format")
        if size > self.max_frame:
            raise FrameTooLarge("object too large for cache")
        if len(buffer) < end + 1 + size + 2:
            return NEED_MORE
        buffer.discard(end + 1)
        value = buffer.take(size + 2)
        if not value.endswith(b"\r\n"):
            raise ProtocolError("bad data chunk")
        return Request(words, value[:-2])

    def encode(self, message: Request) -> bytes:
        """As a client sends it."""
        block = message.value + b"\r\n" if message.words[0] in STORING else b""
        return b"%s\r\n%s" % (b" ".join(message.words), block)


async def main(
    port: int, *, task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED
) -> None:
    items = Items()

    def on_request(conn: TcpConnection, request: Request) -> None:
        conn.context = items.answer(*request)
        send_on(conn)

    on_message = TextCodec(MAX_VALUE).on_message(on_request)

    async def serve_one(conn: TcpConnection) -> None:
        try:
            await conn.dispatch(on_message, low_water_mark=send_on)
        except ProtocolError as error:
            await conn.send_all(b"CLIENT_ERROR %s\r\n" % str(error).encode())
        except Leaving:
            await conn.send_eof()

    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"memcached on {format_address(acceptors[0].address)}", flush=True)
    server = TcpServer(serve_one, listeners=acceptors, watermarks=WATERMARKS)
    await server.serve(task_status=task_status)


def send_on(conn: TcpConnection, _size: int = 0) -> None:
    """Send the rest of the answer. Congested, do so later, and take no request meanwhile."""
    for piece in conn.context:
        if not conn.send(piece):
            conn.stop_reading()
            return
    conn.start_reading()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=11211)
    try:
        trio.run(main, parser.parse_args().port)
    except* KeyboardInterrupt:
        pass
