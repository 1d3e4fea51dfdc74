"""Server CPU and throughput of a pipelined echo of messages: trioreactor beside its peers, in one
run.

Each connection sends so many messages at once, each behind a length of four bytes, and sends the
next when all of them are back. Every server runs in a process of its own on one core, the load on
another. The rounds are interleaved, so that a disturbance of the machine meets all, and the medians
are compared.

    python benchmarks/framed_echo.py [--connections 20] [--size 100] [--pipeline 32]
                                     [--seconds 1.5] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import platform
import select
import socket
import statistics
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import trio
from server_process import ServerProcess, start_servers, two_cores

PROGRAM = Path(__file__).with_name("framed_servers.py")
NAMES = (
    "trioreactor dispatch",
    "trioreactor channel",
    "asyncio readexactly",
    "asyncio Protocol",
    "uvloop readexactly",
    "uvloop Protocol",
    "Twisted",
    "EasyNetwork asyncio",
    "EasyNetwork uvloop",
)
BASE = "asyncio readexactly"
PATIENCE = 10.0


@dataclass
class Round:
    """What one round of one server gave."""

    cpu_us: float
    """Server CPU (user and system) per message."""
    rate: float
    """Messages a second."""


def burst_of(size: int, pipeline: int) -> bytes:
    """The messages that are in flight together on one connection, each another."""
    return b"".join(
        struct.pack(">i", size) + (b"%d:" % number).ljust(size, b"x")[:size]
        for number in range(pipeline)
    )


def drive(
    server: ServerProcess, connections: int, size: int, pipeline: int, seconds: float
) -> Round:
    """Keep one burst in flight on each connection for a while."""
    burst = burst_of(size, pipeline)
    poller = select.epoll()
    socks: dict[int, socket.socket] = {}
    waiting: dict[int, int] = {}
    for _ in range(connections):
        sock = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # That the server does what it is measured for.
        sock.sendall(burst)
        answer = b""
        while len(answer) < len(burst):
            answer += sock.recv(65536)
        assert answer == burst, f"{server.name} does not echo"
        socks[sock.fileno()] = sock
        poller.register(sock, select.EPOLLIN)
    for sock in socks.values():
        sock.sendall(burst)
        waiting[sock.fileno()] = len(burst)

    def complete(fd: int) -> bool:
        """Whether the whole burst is back now."""
        data = socks[fd].recv(65536)
        assert data, f"{server.name} closed a connection"
        waiting[fd] -= len(data)
        return not waiting[fd]

    def run(until: float) -> int:
        done = 0
        while time.perf_counter() < until:
            for fd, _ in poller.poll(0.1):
                if complete(fd):
                    done += 1
                    waiting[fd] = len(burst)
                    socks[fd].sendall(burst)
        return done

    run(time.perf_counter() + 0.2)
    cpu = server.cpu_seconds()
    begun = time.perf_counter()
    done = run(begun + seconds)
    elapsed = time.perf_counter() - begun
    cpu = server.cpu_seconds() - cpu
    for fd, sock in socks.items():
        while not complete(fd):
            pass
        sock.close()
    poller.close()
    messages = done * pipeline
    return Round(cpu_us=cpu / messages * 1e6, rate=messages / elapsed)


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--connections", type=int, default=20)
    parser.add_argument("--size", type=int, default=100, help="bytes a message")
    parser.add_argument("--pipeline", type=int, default=32, help="messages sent at once")
    parser.add_argument("--seconds", type=float, default=1.5, help="a round of one server")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", help="a server's name; may be repeated")
    options = parser.parse_args()

    server_core, load_core = two_cores()
    if load_core is not None:
        os.sched_setaffinity(0, {load_core})
    servers = start_servers(PROGRAM, tuple(options.only or NAMES), server_core)
    rounds: dict[str, list[Round]] = {server.name: [] for server in servers}
    try:
        for _ in range(options.rounds):
            for server in servers:
                rounds[server.name].append(
                    drive(
                        server,
                        options.connections,
                        options.size,
                        options.pipeline,
                        options.seconds,
                    )
                )
    finally:
        for server in servers:
            server.stop()

    print(
        f"{options.size}-byte messages behind 4-byte lengths, {options.pipeline} at once on each "
        f"of {options.connections} connections, medians of {options.rounds} interleaved rounds; "
        f"Python {platform.python_version()}, trio {trio.__version__}, "
        f"{platform.system()} {platform.release()}, {os.cpu_count()} cores"
    )
    cpu = {name: statistics.median(r.cpu_us for r in rs) for name, rs in rounds.items()}
    print(f"{'server':24}{'CPU us/message':>16}{'messages/s':>14}{f'x {BASE}':>24}")
    for name, own in cpu.items():
        rate = statistics.median(r.rate for r in rounds[name])
        ratio = f"{own / cpu[BASE]:.2f}" if BASE in cpu else ""
        print(f"{name:24}{own:>16.2f}{rate:>14,.0f}{ratio:>24}")


if __name__ == "__main__":
    main()
