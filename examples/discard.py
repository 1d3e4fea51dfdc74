"""Clients send and send, nobody wants it, but somebody wants to know how much it was: every
second the server prints what came in.

    python examples/discard.py --port 7009
    head -c 100000000 /dev/zero | nc 127.0.0.1 7009
"""

import argparse

import trio

from trioreactor import (
    Acceptor,
    Buffer,
    Callbacks,
    TcpConnection,
    TcpServer,
    format_address,
    open_tcp_acceptors,
)


def throw_away(_conn: TcpConnection, buffer: Buffer) -> None:
    buffer.discard(len(buffer))


async def print_throughput(server: TcpServer) -> None:
    before = 0
    while True:
        await trio.sleep(1)
        now = server.statistics().bytes_received
        if now != before:
            print(f"{(now - before) / 1e6:.1f} MB/s, {now} bytes in all", flush=True)
        before = now


async def main(
    port: int, *, task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED
) -> None:
    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"discard on {format_address(acceptors[0].address)}", flush=True)
    server = TcpServer(Callbacks(message=throw_away), listeners=acceptors)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(print_throughput, server)
        await server.serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7009)
    try:
        trio.run(main, parser.parse_args().port)
    except* KeyboardInterrupt:
        pass
