"""Telnet users in one room: a line that one of them types is shown to all. One whose terminal has
stopped reading must not delay the others, and one who sends a line without an end must not fill
our memory.

    python examples/chat.py --port 7023
    telnet 127.0.0.1 7023      in several terminals
"""

import argparse
from collections.abc import Iterator

import trio

from trioreactor import (
    Acceptor,
    Buffer,
    ProtocolError,
    TcpConnection,
    TcpServer,
    Watermarks,
    format_address,
    open_tcp_acceptors,
)

MAX_LINE = 1000
# What is queued for one who does not read; then that one is closed as a SLOW_CONSUMER.
WATERMARKS = Watermarks(high=65536, low=16384, limit=262144)


def lines(buffer: Buffer) -> Iterator[str]:
    """Take the complete lines; the beginning of another stays for the next time."""
    while 0 <= (end := buffer.find(b"\n")) <= MAX_LINE:
        text = buffer.take(end + 1).decode("utf-8", "replace")
        # No control characters, or one user could repaint the others' terminals.
        yield "".join(filter(str.isprintable, text))
    if len(buffer) > MAX_LINE:
        raise ProtocolError(f"a line of more than {MAX_LINE} bytes")


async def main(
    port: int, *, task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED
) -> None:
    def say(text: str) -> None:
        server.broadcast(f"{text}\r\n".encode())

    async def chat(conn: TcpConnection) -> None:
        name = format_address(conn.peer_address)

        def on_message(_conn: TcpConnection, buffer: Buffer) -> None:
            for line in lines(buffer):
                say(f"{name}: {line}")

        say(f"* {name} has come, {len(server.connections)} are here")
        try:
            await conn.dispatch(on_message)
        finally:
            say(f"* {name} leaves")

    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"chat on {format_address(acceptors[0].address)}", flush=True)
    server = TcpServer(chat, listeners=acceptors, watermarks=WATERMARKS)
    await server.serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7023)
    try:
        trio.run(main, parser.parse_args().port)
    except* KeyboardInterrupt:
        pass
