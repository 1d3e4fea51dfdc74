"""Connections cost memory and descriptors, and many of them belong to nobody any more: one that has
been idle for some seconds is closed, and those above a maximum are closed at once. Each end is
told with its reason. An echo for those that have something to say.

    python examples/idleconnection.py --port 7009 --idle 8 --most 100
    nc 127.0.0.1 7009      and wait
"""

import argparse

import trio

from trioreactor import (
    Acceptor,
    Buffer,
    Callbacks,
    ConnectionState,
    Limits,
    TcpConnection,
    TcpServer,
    Timeouts,
    format_address,
    open_tcp_acceptors,
)


def on_connection(conn: TcpConnection) -> None:
    where = format_address(conn.peer_address)
    if conn.state is ConnectionState.CONNECTED:
        print(f"{where} is up", flush=True)
    else:
        assert conn.close_reason is not None
        print(f"{where} is down: {conn.close_reason.name}", flush=True)


def on_message(conn: TcpConnection, buffer: Buffer) -> None:
    if not conn.send(buffer.take()):
        # One that does not read what it is sent is idle, soon.
        conn.stop_reading()


ECHO = Callbacks(
    connection=on_connection,
    message=on_message,
    low_water_mark=lambda conn, _size: conn.start_reading(),
)


async def main(
    port: int,
    idle: float = 8,
    most: int = 100,
    *,
    task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
) -> None:
    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    where = format_address(acceptors[0].address)
    print(f"echo on {where} for {most}, none of them idle for {idle:g} s", flush=True)
    server = TcpServer(
        ECHO,
        listeners=acceptors,
        timeouts=Timeouts(idle=idle),
        limits=Limits(connections=most, when_full="reject"),
    )
    await server.serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7009)
    parser.add_argument("--idle", type=float, default=8, help="seconds")
    parser.add_argument("--most", type=int, default=100, help="connections")
    args = parser.parse_args()
    try:
        trio.run(main, args.port, args.idle, args.most)
    except* KeyboardInterrupt:
        pass
