"""What a client sends goes on to a target, what that answers goes back, and where one side is slow
the other has to wait, so that our memory never fills. An EOF is passed on, for either side may
speak after the other's last word; so is a reset. Done with two loops, or with two callbacks.

    python examples/tcprelay.py --port 7100 --target 127.0.0.1:7007 --mode dispatch
"""

import argparse

import trio

from trioreactor import (
    Acceptor,
    Buffer,
    CloseReason,
    ConnectError,
    TcpConnection,
    TcpServer,
    format_address,
    open_tcp_acceptors,
    open_tcp_connection,
)


async def coroutine(source: TcpConnection, sink: TcpConnection) -> None:
    async for data in source:
        await sink.send_all(data)
    await sink.send_eof()


async def dispatch(source: TcpConnection, sink: TcpConnection) -> None:
    def send_on(source: TcpConnection, buffer: Buffer) -> None:
        if not sink.send(buffer.take()):
            source.stop_reading()

    sink.low_water_mark_callback = lambda _sink, _size: source.start_reading()
    await source.dispatch(send_on)
    await sink.send_eof()


async def relay(  # noqa: ASYNC910 each way has checkpoints
    one: TcpConnection, other: TcpConnection, mode: str = "coroutine", begin: bytes = b""
) -> None:
    """Pass on both ways, *begin* first to *other*, until both have ended or one is broken."""
    pass_on = dispatch if mode == "dispatch" else coroutine
    try:
        other.send(begin)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pass_on, one, other)
            nursery.start_soon(pass_on, other, one)
    except* trio.BrokenResourceError:
        for conn in (one, other):
            conn.force_close(CloseReason.PEER_RESET, reset=True)


async def main(
    port: int,
    target: str,
    mode: str = "coroutine",
    *,
    task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
) -> None:
    host, _, target_port = target.rpartition(":")

    async def handler(client: TcpConnection) -> None:  # noqa: ASYNC910 connecting has one
        try:
            async with await open_tcp_connection(host, int(target_port)) as server:
                await relay(client, server, mode)
                a, b = client.statistics(), server.statistics()
            print(f"{a.pauses + b.pauses} pauses, {a.resumes + b.resumes} resumes", flush=True)
        except ConnectError as error:
            print(error, flush=True)
            client.force_close(reset=True)

    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"relay on {format_address(acceptors[0].address)} to {target}", flush=True)
    await TcpServer(handler, listeners=acceptors).serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7100)
    parser.add_argument("--target", default="127.0.0.1:7007")
    parser.add_argument("--mode", choices=["coroutine", "dispatch"], default="coroutine")
    args = parser.parse_args()
    try:
        trio.run(main, args.port, args.target, args.mode)
    except* KeyboardInterrupt:
        pass
