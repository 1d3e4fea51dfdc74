"""A server that can serve only so many clients at a time, and what becomes of the next one.

"reject": it is accepted and closed at once, so it knows, and can try another server.
"wait": it is left in the system's queue, connected but not served, until somebody leaves.

    python examples/maxconnection.py --port 7007 --most 2 --when-full reject
    nc 127.0.0.1 7007      in three terminals
"""

import argparse
from typing import Literal

import trio

from trioreactor import (
    Acceptor,
    Limits,
    TcpConnection,
    TcpServer,
    format_address,
    open_tcp_acceptors,
)


async def echo(conn: TcpConnection) -> None:
    async for data in conn:
        await conn.send_all(data)


async def main(
    port: int,
    most: int = 2,
    when_full: Literal["wait", "reject"] = "reject",
    *,
    task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
) -> None:
    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    where = format_address(acceptors[0].address)
    print(f"echo for {most} at a time on {where}; the others {when_full}", flush=True)
    limits = Limits(connections=most, when_full=when_full)
    await TcpServer(echo, listeners=acceptors, limits=limits).serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7007)
    parser.add_argument("--most", type=int, default=2)
    parser.add_argument("--when-full", choices=["wait", "reject"], default="reject")
    args = parser.parse_args()
    try:
        trio.run(main, args.port, args.most, args.when_full)
    except* KeyboardInterrupt:
        pass
