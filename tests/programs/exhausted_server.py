"""An echo server that may have only 64 descriptors, for the test of running out of them.

Prints its port; then answers every line on stdin with a line of JSON about itself, and ends at EOF.
"""

from __future__ import annotations

import json
import logging
import resource
import time

import trio

from trioreactor import SocketOptions, TcpConnection, TcpServer, open_tcp_acceptors

DESCRIPTORS = 64


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


async def echo(conn: TcpConnection) -> None:
    async for chunk in conn:
        await conn.send_all(chunk)


async def main() -> None:
    log = Lines()
    logging.getLogger().addHandler(log)
    # A backlog that holds every client, so that none is turned away by the kernel.
    acceptors = await open_tcp_acceptors(
        0, host="127.0.0.1", socket_options=SocketOptions(backlog=1024)
    )
    server = TcpServer(echo, listeners=acceptors)
    async with trio.open_nursery() as nursery, trio.lowlevel.FdStream(0) as stdin:
        await nursery.start(server.serve)
        print(acceptors[0].address[1], flush=True)
        async for lines in stdin:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            statistics = server.statistics()
            answer = {
                "time": time.monotonic(),
                "cpu": usage.ru_utime + usage.ru_stime,
                "opened": statistics.opened,
                "active": statistics.active,
                "closed": sum(statistics.closed.values()),
                "shed": statistics.shed,
                "failed": sum(acceptors[0].statistics().errors.values()),
                "log": log.lines,
            }
            for _ in lines.splitlines():
                print(json.dumps(answer), flush=True)
        server.close()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    trio.run(main)
