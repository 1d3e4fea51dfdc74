"""A client gets characters as fast as it reads them, for as long as it likes, and the server
keeps one block in memory for each: the next is sent when the one before is with the kernel.

    python examples/chargen.py --port 7019
    nc 127.0.0.1 7019 | head -20
"""

import argparse

import trio

from trioreactor import (
    Acceptor,
    Buffer,
    Callbacks,
    ConnectionState,
    TcpConnection,
    TcpServer,
    format_address,
    open_tcp_acceptors,
)

# Lines of 72 of the 95 printable characters, each begun one later: after 95 lines, all over again.
PRINTABLE = bytes(range(0x20, 0x7F))
LINES = b"".join((PRINTABLE * 2)[start : start + 72] + b"\r\n" for start in range(95))


def begin(conn: TcpConnection) -> None:
    if conn.state is ConnectionState.CONNECTED:
        conn.send(LINES)


def send_more(conn: TcpConnection) -> None:
    conn.send(LINES)


def throw_away(_conn: TcpConnection, buffer: Buffer) -> None:
    buffer.discard(len(buffer))


async def main(
    port: int, *, task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED
) -> None:
    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"chargen on {format_address(acceptors[0].address)}", flush=True)
    handler = Callbacks(connection=begin, message=throw_away, write_complete=send_more)
    await TcpServer(handler, listeners=acceptors).serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7019)
    try:
        trio.run(main, parser.parse_args().port)
    except* KeyboardInterrupt:
        pass
