"""Clients send bytes and get them back, and one that sends without reading must not fill our
memory. The same server twice: with a coroutine for each connection, and with callbacks.

    python examples/echo.py --port 7007 --mode dispatch
    nc 127.0.0.1 7007
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


async def echo(conn: TcpConnection) -> None:
    async for data in conn:
        # Waits while the client does not read; meanwhile we do not read either.
        await conn.send_all(data)


def send_back(conn: TcpConnection, buffer: Buffer) -> None:
    if not conn.send(buffer.take()):
        # Above the high-water mark: leave what comes now with the client's kernel.
        conn.stop_reading()


def read_on(conn: TcpConnection, _size: int) -> None:
    conn.start_reading()


MODES = {"coroutine": echo, "dispatch": Callbacks(message=send_back, low_water_mark=read_on)}


async def main(
    port: int,
    mode: str = "coroutine",
    *,
    task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
) -> None:
    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"echo ({mode}) on {format_address(acceptors[0].address)}", flush=True)
    await TcpServer(MODES[mode], listeners=acceptors).serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7007)
    parser.add_argument("--mode", choices=MODES, default="coroutine")
    args = parser.parse_args()
    try:
        trio.run(main, args.port, args.mode)
    except* KeyboardInterrupt:
        pass
