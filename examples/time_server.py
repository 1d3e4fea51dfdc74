"""Whoever connects is told the time as a number, and the client closes first, so that the many
connections of a time server leave their TIME_WAIT with the clients.

The callback style: `connection` is called when a connection is up and again when it is down.
`shutdown` half-closes after the four bytes; a client that does not close after that is closed
after `Timeouts.linger`.

    python examples/time_server.py --port 7037
    nc 127.0.0.1 7037 | od -An -tu4 --endian=big
"""

import argparse
import time

import trio

from trioreactor import (
    Acceptor,
    Buffer,
    Callbacks,
    ConnectionState,
    TcpConnection,
    TcpServer,
    Timeouts,
    format_address,
    open_tcp_acceptors,
)

# RFC 868 counts from 1900, Unix from 1970.
SECONDS_1900_TO_1970 = 2_208_988_800


def tell_time(conn: TcpConnection) -> None:
    if conn.state is ConnectionState.CONNECTED:
        now = int(time.time()) + SECONDS_1900_TO_1970
        conn.send((now % 2**32).to_bytes(4, "big"))
        conn.shutdown()


def throw_away(_conn: TcpConnection, buffer: Buffer) -> None:
    buffer.discard(len(buffer))


async def main(
    port: int, *, task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED
) -> None:
    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"time on {format_address(acceptors[0].address)}", flush=True)
    handler = Callbacks(connection=tell_time, message=throw_away)
    server = TcpServer(handler, listeners=acceptors, timeouts=Timeouts(linger=5))
    await server.serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7037)
    try:
        trio.run(main, parser.parse_args().port)
    except* KeyboardInterrupt:
        pass
