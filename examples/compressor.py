"""Clients send messages behind a 32-bit length and get each back compressed by zlib, which lets
other threads run meanwhile: so with `--threads 2` two clients' messages are compressed at once.

    python examples/compressor.py --port 9990 --threads 2
"""

import argparse
import zlib
from contextlib import AsyncExitStack

import trio

from trioreactor import (
    Acceptor,
    Callbacks,
    EventLoopThreadPool,
    LengthHeaderCodec,
    TcpConnection,
    TcpServer,
    format_address,
    open_tcp_acceptors,
)

CODEC = LengthHeaderCodec(max_frame=1 << 20)


def compress(conn: TcpConnection, message: bytes) -> None:
    conn.send(CODEC.encode(zlib.compress(message)))


async def main(
    port: int,
    threads: int = 0,
    *,
    task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
) -> None:
    async with AsyncExitStack() as stack:
        # Without any, this loop serves what it accepts.
        loops = await stack.enter_async_context(EventLoopThreadPool(threads)) if threads else None
        acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
        print(f"compressor on {format_address(acceptors[0].address)}", flush=True)
        handler = Callbacks(message=CODEC.on_message(compress))
        server = TcpServer(handler, listeners=acceptors, loops=loops)
        await server.serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=9990)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    try:
        trio.run(main, arguments.port, arguments.threads)
    except* KeyboardInterrupt:
        pass
