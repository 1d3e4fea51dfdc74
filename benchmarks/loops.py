"""What `TcpServer(loops=...)` gains and costs: with a handler that compresses, which lets other
threads run, with one that only sends back what comes, which does not, and with short connections,
each of which is handed over.

For each number of loops: requests a second, and the server's CPU time for each. 0 is a server
without a pool. The rounds are interleaved, and medians of them are shown.

    python benchmarks/loops.py [--loops 0 1 2] [--rounds 5] [--seconds 1]
"""

from __future__ import annotations

import argparse
import os
import random
import select
import socket
import statistics
import sys
import time
import zlib
from contextlib import AsyncExitStack
from multiprocessing import get_context
from multiprocessing.connection import Connection

import trio

from trioreactor import Buffer, Callbacks, EventLoopThreadPool, TcpConnection, TcpServer

CONNECTIONS = 16
# Text-like, so that compressing it takes its time.
PAGE = bytes(random.Random(1).choices(b"etaoin shrdlu\n", k=32768))
ANSWER = zlib.compress(PAGE)


def send_back(conn: TcpConnection, buffer: Buffer) -> None:
    conn.send(buffer.take())


def compress(conn: TcpConnection, buffer: Buffer) -> None:
    while len(buffer) >= len(PAGE):
        conn.send(zlib.compress(buffer.take(len(PAGE))))


# Handler, request, answer, and whether each request comes by a connection of its own.
WORKS = {
    "compress 32 KiB": (compress, PAGE, ANSWER, False),
    "echo 64 bytes": (send_back, bytes(64), bytes(64), False),
    "connect, echo": (send_back, bytes(64), bytes(64), True),
}


def serve(pipe: Connection, work: str, loops: int) -> None:
    """A server in a process of its own; tells its CPU time when asked."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            pool = await stack.enter_async_context(EventLoopThreadPool(loops)) if loops else None
            handler = Callbacks(message=WORKS[work][0])
            # Sixteen that compress in one turn of the loop are the work, and nothing to warn of.
            server = TcpServer(handler, 0, host="127.0.0.1", loops=pool, watchdog=None)
            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve)
                pipe.send(server.addresses[0])
                while await trio.to_thread.run_sync(pipe.recv):
                    pipe.send(time.process_time())
                server.close()

    trio.run(main)


class Load:
    """Clients with one request in flight each."""

    def __init__(
        self, address: tuple[str, int], request: bytes, answer: bytes, reconnect: bool
    ) -> None:
        self._address = address
        self._request = request
        self._answer = len(answer)
        self._reconnect = reconnect
        self._socks: dict[int, socket.socket] = {}
        # Bytes of the answer that have not come.
        self._missing: dict[int, int] = {}
        self._poll = select.epoll()
        for _ in range(CONNECTIONS):
            self._connect()

    def _connect(self) -> int:
        sock = socket.create_connection(self._address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socks[sock.fileno()] = sock
        self._poll.register(sock, select.EPOLLIN)
        return sock.fileno()

    def _ask(self, number: int) -> None:
        self._socks[number].sendall(self._request)
        self._missing[number] = self._answer

    def run(self, seconds: float) -> tuple[int, float]:
        """How many answers came, and in what time."""
        begun = time.monotonic()
        for number in self._socks:
            self._ask(number)
        answers = 0
        while self._missing:
            for ready, _ in self._poll.poll():
                number = ready
                got = len(self._socks[number].recv(65536))
                assert got, "the server has gone"
                self._missing[number] -= got
                if self._missing[number]:
                    continue
                answers += 1
                del self._missing[number]
                if self._reconnect:
                    self._socks.pop(number).close()
                    number = self._connect()
                if time.monotonic() - begun < seconds:
                    self._ask(number)
        return answers, time.monotonic() - begun

    def close(self) -> None:
        self._poll.close()
        for sock in self._socks.values():
            sock.close()


def measure(work: str, loops: int, seconds: float) -> tuple[float, float]:
    """Requests a second, and the server's CPU time for each, in microseconds."""
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=serve, args=(theirs, work, loops))
    process.start()
    load = Load(ours.recv(), *WORKS[work][1:])
    load.run(seconds / 5)
    ours.send(True)
    before = ours.recv()
    answers, took = load.run(seconds)
    ours.send(True)
    cpu = ours.recv() - before
    load.close()
    ours.send(False)
    process.join()
    return answers / took, cpu / answers * 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(arguments.rounds):
        for work in WORKS:
            for loops in arguments.loops:
                figures = measure(work, loops, arguments.seconds)
                found.setdefault((work, loops), []).append(figures)
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, {CONNECTIONS} connections")
    print(f"{'work':18}{'loops':>8}{'requests/s':>14}{'CPU us/request':>18}")
    for (work, loops), figures in sorted(found.items()):
        rate, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"{work:18}{loops or 'none':>8}{rate:14,.0f}{cpu:18,.1f}")


if __name__ == "__main__":
    main()
