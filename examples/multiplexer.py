"""Many clients share one connection to a backend: muduo's multiplexer. Frames of number 0 tell the
backend `CONN 7 FROM 10.0.0.1:4321 IS UP` and `... IS DOWN`, and it may say `DISCONNECT 7`; those of
number 7 carry what client 7 sends, and what it is sent.

    | length of the payload, 1 byte | number, 2 bytes, little-endian | payload |

When the backend is slow the clients wait; when a client is slow, all do, but not if it has taken
nothing for seconds. Without a backend clients are reset. One that sends an EOF has ended.

    python examples/demultiplexer.py --port 7201 --target 127.0.0.1:7007
    python examples/multiplexer.py --port 7200 --backend 127.0.0.1:7201
"""

import argparse
import logging
import re
from collections import deque
from contextlib import suppress
from functools import partial

import trio

from trioreactor import (
    Acceptor,
    Backoff,
    FramedChannel,
    LengthHeaderCodec,
    Limits,
    TcpClient,
    TcpConnection,
    TcpServer,
    Timeouts,
    format_address,
    open_tcp_acceptors,
)

MAX_PAYLOAD = 255
CODEC = LengthHeaderCodec(1, adjustment=2, max_frame=2 + MAX_PAYLOAD).map(
    lambda frame: frame[0].to_bytes(2, "little") + frame[1],
    lambda data: (int.from_bytes(data[:2], "little"), data[2:]),
)
DISCONNECT = re.compile(rb"DISCONNECT (\d{1,5})\r\n")
# Few enough that a number rests before it is another client's: some of the old may be under way.
LIMITS = Limits(connections=10_000)
BACKOFF = Backoff(initial=0.25, maximum=5, reset_after=5)
GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


class Multiplexer:
    """A handler for clients, and in `link` the one for the connection to the backend."""

    def __init__(self) -> None:
        self.channel: FramedChannel[tuple[int, bytes]] | None = None
        self.clients: dict[int, TcpConnection] = {}
        self.numbers = deque(range(1, 1 << 16))

    async def link(self, conn: TcpConnection) -> None:
        """Hand to the clients what the backend sends."""
        self.channel = FramedChannel(conn, CODEC)
        try:
            async for number, payload in self.channel:
                told = DISCONNECT.fullmatch(payload) if number == 0 else None
                client = self.clients.get(int(told[1]) if told else number)
                with suppress(*GONE):
                    if client and told:
                        client.shutdown()
                    elif client:
                        await client.send_all(payload)
        finally:
            self.channel = None
            for client in self.clients.values():
                client.force_close(reset=True)

    async def __call__(self, client: TcpConnection) -> None:  # noqa: ASYNC910 the loop has some
        """Hand to the backend what *client* sends."""
        if (channel := self.channel) is None:
            client.force_close(reset=True)
            return  # noqa: ASYNC910 a task of its own
        self.clients[number := self.numbers.popleft()] = client
        name = b"CONN %d FROM %b IS" % (number, format_address(client.peer_address).encode())
        with suppress(*GONE):
            try:
                await channel.send((0, b"%b UP\r\n" % name))
                async for data in client:
                    for start in range(0, len(data), MAX_PAYLOAD):
                        await channel.send((number, data[start : start + MAX_PAYLOAD]))
            finally:
                del self.clients[number]
                self.numbers.append(number)
                channel.send_nowait((0, b"%b DOWN\r\n" % name))


async def main(
    port: int,
    backend: str,
    patience: float = 5,
    *,
    task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
) -> None:
    host, _, backend_port = backend.rpartition(":")
    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"multiplexer on {format_address(acceptors[0].address)}", flush=True)
    tell = partial(print, "backend:", flush=True)
    mux, timeouts = Multiplexer(), Timeouts(write_stall=patience)
    server = TcpServer(mux, listeners=acceptors, limits=LIMITS, timeouts=timeouts)
    async with TcpClient(host, int(backend_port), mux.link, backoff=BACKOFF, on_attempt=tell):
        await server.serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7200)
    parser.add_argument("--backend", default="127.0.0.1:7201", metavar="HOST:PORT")
    args = parser.parse_args()
    logging.getLogger("trioreactor.connector").setLevel(logging.ERROR)  # on_attempt says it all
    try:
        trio.run(main, args.port, args.backend)
    except* KeyboardInterrupt:
        pass
