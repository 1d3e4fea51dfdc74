"""Whoever connects gets a file, and a thousand clients that read slowly must not mean a thousand
files in memory. Three ways to send it, from the shortest to the most careful.

whole      read it all, send it all: for small files only
chunks     callbacks: a chunk is read when the one before is with the kernel
coroutine  send_all waits while the client is slow, and the disk is read in a thread

    python examples/download.py --port 7021 --way chunks FILE
    nc 127.0.0.1 7021 | cmp - FILE
"""

import argparse

import trio

from trioreactor import (
    Acceptor,
    Buffer,
    TcpConnection,
    TcpServer,
    format_address,
    open_tcp_acceptors,
)

CHUNK = 65536


async def whole(conn: TcpConnection, path: str) -> None:
    await conn.send_all(await trio.Path(path).read_bytes())


async def chunks(conn: TcpConnection, path: str) -> None:
    async with await trio.open_file(path, "rb") as file:
        with trio.CancelScope() as sending:

            def send_next(conn: TcpConnection) -> None:
                # Blocks the loop while the disk is read: no matter if the system has it cached.
                if chunk := file.wrapped.read(CHUNK):
                    conn.send(chunk)
                else:
                    sending.cancel()

            conn.write_complete_callback = send_next
            send_next(conn)
            # Clients have nothing to say, but who reads hears of one that is gone.
            await conn.dispatch(throw_away)
            await conn.wait_closed()


def throw_away(_conn: TcpConnection, buffer: Buffer) -> None:
    buffer.discard(len(buffer))


async def coroutine(conn: TcpConnection, path: str) -> None:
    async with await trio.open_file(path, "rb") as file:
        while chunk := await file.read(CHUNK):
            await conn.send_all(chunk)


WAYS = {"whole": whole, "chunks": chunks, "coroutine": coroutine}


async def main(
    port: int,
    way: str,
    path: str,
    *,
    task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
) -> None:
    async def handler(conn: TcpConnection) -> None:
        await WAYS[way](conn, path)

    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"{path} ({way}) on {format_address(acceptors[0].address)}", flush=True)
    await TcpServer(handler, listeners=acceptors).serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7021)
    parser.add_argument("--way", choices=WAYS, default="coroutine")
    parser.add_argument("path", metavar="FILE")
    args = parser.parse_args()
    try:
        trio.run(main, args.port, args.way, args.path)
    except* KeyboardInterrupt:
        pass
