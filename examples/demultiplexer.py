"""The other end of multiplexer.py: for each of its clients we connect to a target, so that both
together are a tunnel. For what is still to be sent to a target there is little room: then the whole
tunnel waits, as long as that target takes something now and then.

    python examples/echo.py --port 7007
    python examples/demultiplexer.py --port 7201 --target 127.0.0.1:7007
    python examples/multiplexer.py --port 7200 --backend 127.0.0.1:7201
"""

import argparse
import re
from contextlib import suppress

import trio
from multiplexer import CODEC, GONE, MAX_PAYLOAD

from trioreactor import (
    Acceptor,
    ConnectError,
    FramedChannel,
    TcpConnection,
    TcpServer,
    Timeouts,
    format_address,
    open_tcp_acceptors,
    open_tcp_connection,
)

CONN = re.compile(rb"CONN (\d+) FROM \S+ IS (UP|DOWN)\r\n")
# Payloads that wait for a target to be connected.
ROOM = 64


async def main(
    port: int,
    target: str,
    patience: float = 5,
    *,
    task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
) -> None:
    host, _, target_port = target.rpartition(":")
    timeouts = Timeouts(write_stall=patience)

    async def tunnel(  # noqa: ASYNC910 connecting has checkpoints
        channel: FramedChannel[tuple[int, bytes]],
        number: int,
        payloads: trio.MemoryReceiveChannel[bytes],
    ) -> None:
        """One client's part, until it or its target has ended."""

        async def back() -> None:
            async for data in conn:
                for start in range(0, len(data), MAX_PAYLOAD):
                    await channel.send((number, data[start : start + MAX_PAYLOAD]))
            nursery.cancel_scope.cancel()

        try:
            async with (
                payloads,
                await open_tcp_connection(
                    host, int(target_port), timeouts=timeouts, connect_timeout=patience
                ) as conn,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(back)
                async for payload in payloads:
                    await conn.send_all(payload)
                nursery.cancel_scope.cancel()
        except* (ConnectError, *GONE):
            pass
        with suppress(*GONE):
            channel.send_nowait((0, b"DISCONNECT %d\r\n" % number))

    async def link(conn: TcpConnection) -> None:  # noqa: ASYNC910 the loop has some
        channel = FramedChannel(conn, CODEC)
        inputs: dict[int, trio.MemorySendChannel[bytes]] = {}
        async with trio.open_nursery() as nursery:
            async for number, payload in channel:
                if number and number in inputs:
                    with suppress(*GONE):
                        await inputs[number].send(payload)
                elif told := CONN.fullmatch(payload):
                    if told[2] == b"UP":
                        inputs[int(told[1])], payloads = trio.open_memory_channel[bytes](ROOM)
                        nursery.start_soon(tunnel, channel, int(told[1]), payloads)
                    elif ended := inputs.pop(int(told[1]), None):
                        ended.close()
            nursery.cancel_scope.cancel()

    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"demultiplexer on {format_address(acceptors[0].address)}", flush=True)
    await TcpServer(link, listeners=acceptors).serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7201)
    parser.add_argument("--target", default="127.0.0.1:7007", metavar="HOST:PORT")
    parser.add_argument("--patience", type=float, default=5, help="seconds for a slow target")
    args = parser.parse_args()
    try:
        trio.run(main, args.port, args.target, args.patience)
    except* KeyboardInterrupt:
        pass
