"""Whoever connects is told the time as a line of text, and that is all: the server sends, and
closes when the handler returns.

    python examples/daytime.py --port 7013
    nc 127.0.0.1 7013
"""

import argparse
from datetime import UTC, datetime

import trio

from trioreactor import Acceptor, TcpConnection, TcpServer, format_address, open_tcp_acceptors


async def daytime(conn: TcpConnection) -> None:
    line = f"{datetime.now(UTC):%A, %B %d, %Y %H:%M:%S-%Z}\r\n"
    await conn.send_all(line.encode("ascii"))


async def main(
    port: int, *, task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED
) -> None:
    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"daytime on {format_address(acceptors[0].address)}", flush=True)
    await TcpServer(daytime, listeners=acceptors).serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7013)
    try:
        trio.run(main, parser.parse_args().port)
    except* KeyboardInterrupt:
        pass
