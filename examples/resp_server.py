"""A small Redis: strings by key, over RESP2, for redis-cli and redis-benchmark. A client may send
many requests without waiting, and has their answers in one packet. What it asks for and does not
read is not held for it, and what it sends and stores is bounded.

    python examples/resp_server.py --port 6379
    redis-benchmark -p 6379 -q -t ping,set,get -P 16
"""

import argparse

import trio
from parts.resp_strings import Leaving, Strings, array

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

# Few arguments, for a request is parsed anew whenever more of it has come.
MAX_REQUEST, MAX_ARGUMENTS, MAX_INLINE = 1 << 20, 256, 4096
WATERMARKS = Watermarks(receive_limit=2 * MAX_REQUEST)


class RespCodec(Codec[list[bytes]]):
    """Requests: arrays of strings, or the words of a line. An empty one is no request."""

    def decode(self, buffer: Buffer) -> list[bytes] | NeedMore:
        """The next request, if all of it is there."""
        head = buffer.peek(512)  # most are shorter
        while isinstance(found := parse(head), int):
            if found > self.max_frame:
                raise FrameTooLarge("invalid bulk length")
            if found > len(buffer):
                return NEED_MORE
            head = buffer.peek(max(found, 2 * len(head)))
        buffer.discard(found[1])
        return found[0]

    def encode(self, message: list[bytes]) -> bytes:
        """As a client sends it."""
        return array(message)


def parse(data: bytes) -> tuple[list[bytes], int] | int:
    """A request and its size; or a size that it does not fall short of, larger than *data*'s."""
    if data[:1] != b"*":
        end = data.find(b"\n", 0, MAX_INLINE)
        if end < 0 and len(data) >= MAX_INLINE:
            raise FrameTooLarge("too big inline request")
        return len(data) + 1 if end < 0 else (data[:end].split(), end + 1)
    count, at = number(data, 0, MAX_ARGUMENTS, "invalid multibulk length")
    request: list[bytes] = []
    for _ in range(count):
        if data[at : at + 1] not in (b"$", b""):
            raise ProtocolError("expected '$'")
        size, begin = number(data, at, MAX_REQUEST, "invalid bulk length")
        at = begin + size + 2
        if at > len(data):
            return at
        if data[at - 2 : at] != b"\r\n":
            raise ProtocolError("a string longer than it says")
        request.append(data[begin : at - 2])
    return (request, at) if at <= len(data) else at


def number(data: bytes, at: int, most: int, otherwise: str) -> tuple[int, int]:
    """A line's number, and where the next begins: behind *data*, while this has no end yet."""
    end = data.find(b"\r\n", at + 1, at + 24)
    if end < 0 and len(data) < at + 24:
        return 0, len(data) + 1
    if end < 0 or not data[at + 1 : end].isdigit() or (found := int(data[at + 1 : end])) > most:
        raise ProtocolError(otherwise)
    return found, end + 2


async def main(
    port: int, *, task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED
) -> None:
    strings = Strings()

    def on_request(conn: TcpConnection, request: list[bytes]) -> None:
        if request and not conn.send(strings.obey(request)):
            # It reads too slowly: take no more requests until it has.
            conn.stop_reading()

    on_message = RespCodec(MAX_REQUEST).on_message(on_request)

    async def serve_one(conn: TcpConnection) -> None:
        try:
            await conn.dispatch(on_message, low_water_mark=lambda conn, _size: conn.start_reading())
        except ProtocolError as error:
            await conn.send_all(b"-ERR Protocol error: %s\r\n" % str(error).encode())
        except Leaving:
            await conn.send_all(b"+OK\r\n")

    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"RESP on {format_address(acceptors[0].address)}", flush=True)
    server = TcpServer(serve_one, listeners=acceptors, watermarks=WATERMARKS)
    await server.serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=6379)
    try:
        trio.run(main, parser.parse_args().port)
    except* KeyboardInterrupt:
        pass
