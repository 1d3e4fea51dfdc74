"""What `Acceptor(batch=...)` costs and gains: a crowd arrives while one client is being served.

For each batch: how many connections a second are accepted, and how long the client that was there
before has to wait for its answers meanwhile.

    python benchmarks/accept_batch.py [--crowd 2000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.connection import Connection

import trio

from trioreactor import Acceptor, Buffer, Callbacks, TcpConnection, TcpServer

BATCHES = (1, 4, 16, 64, None)


def on_message(conn: TcpConnection, buffer: Buffer) -> None:
    conn.send(buffer.take())


def serve(pipe: Connection, batch: int | None) -> None:
    """A server in a process of its own; tells the crowd's arrival time when asked."""

    async def main() -> None:
        sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
        server = TcpServer(Callbacks(message=on_message), listeners=[Acceptor(sock, batch=batch)])
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            pipe.send(sock.getsockname())
            expected = await trio.to_thread.run_sync(pipe.recv)
            while len(server.connections) < expected:
                await trio.sleep(0.0005)
            pipe.send(time.monotonic())
            await trio.to_thread.run_sync(pipe.recv)
            server.close()

    trio.run(main)


def measure(batch: int | None, crowd: int) -> tuple[float, float, float]:
    """Connections a second, and the median and the longest wait of the one that was there, ms."""
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=serve, args=(theirs, batch))
    process.start()
    address = ours.recv()
    with ExitStack() as stack:
        old = stack.enter_context(socket.create_connection(address))
        old.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        old.sendall(b"x")
        old.recv(1)
        # Stopped, the server finds the whole crowd waiting when it goes on.
        assert process.pid is not None
        os.kill(process.pid, 19)
        for _ in range(crowd):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(address)
            stack.callback(sock.close)
        begun = time.monotonic()
        os.kill(process.pid, 18)
        ours.send(crowd + 1)
        waits = []
        while not ours.poll():
            asked = time.monotonic()
            old.sendall(b"x")
            old.recv(1)
            waits.append(time.monotonic() - asked)
        seconds = ours.recv() - begun
        ours.send(None)
        process.join()
    return crowd / seconds, statistics.median(waits) * 1000, max(waits) * 1000


def main() -> None:
    """Run the rounds, interleaved, and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crowd", type=int, default=2000, help="connections that arrive at once")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    results: dict[int | None, list[tuple[float, float, float]]] = {batch: [] for batch in BATCHES}
    for _ in range(options.rounds):
        for batch in BATCHES:
            results[batch].append(measure(batch, options.crowd))
    print(f"{options.crowd} connections at once, medians of {options.rounds} interleaved rounds")
    print(f"{'batch':>6}{'accepted/s':>12}{'wait median ms':>16}{'wait longest ms':>17}")
    for batch, rounds in results.items():
        rate, middle, longest = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{batch or 'all':>6}{rate:>12,.0f}{middle:>16.2f}{longest:>17.2f}")


if __name__ == "__main__":
    sys.exit(main())
