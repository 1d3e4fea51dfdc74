"""Server CPU and throughput of small echoes: trioreactor beside its peers, in one run.

Every server runs in a process of its own on one core, the load on another. The rounds are
interleaved, so that a disturbance of the machine meets all, and the medians are compared.

    python benchmarks/round_trip.py [--connections 50] [--size 64] [--seconds 1.5] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import platform
import select
import socket
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import trio
from server_process import ServerProcess, start_servers, two_cores

SERVERS = Path(__file__).with_name("servers.py")
NAMES = (
    "trioreactor dispatch",
    "trioreactor send",
    "trioreactor send_all",
    "trio serve_tcp",
    "asyncio Protocol",
    "asyncio streams",
    "uvloop Protocol",
    "uvloop streams",
)


@dataclass
class Round:
    """What one round of one server gave."""

    cpu_us: float
    """Server CPU (user and system) per round trip."""
    rate: float
    """Round trips a second."""


def drive(server: ServerProcess, connections: int, size: int, seconds: float) -> Round:
    """Keep one message in flight on each connection for a while."""
    message = b"x" * size
    poller = select.epoll()
    socks: dict[int, socket.socket] = {}
    waiting: dict[int, int] = {}
    for _ in range(connections):
        sock = socket.create_connection(("127.0.0.1", server.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        socks[sock.fileno()] = sock
        poller.register(sock, select.EPOLLIN)
    for sock in socks.values():
        sock.send(message)
        waiting[sock.fileno()] = size

    def answer(fd: int) -> bool:
        """Whether the answer is now complete."""
        waiting[fd] -= len(socks[fd].recv(65536))
        return not waiting[fd]

    def run(until: float) -> int:
        done = 0
        while time.perf_counter() < until:
            for fd, _ in poller.poll(0.1):
                if answer(fd):
                    done += 1
                    waiting[fd] = size
                    socks[fd].send(message)
        return done

    run(time.perf_counter() + 0.2)
    cpu = server.cpu_seconds()
    begun = time.perf_counter()
    done = run(begun + seconds)
    elapsed = time.perf_counter() - begun
    cpu = server.cpu_seconds() - cpu
    # Closing with an answer unread would send a reset, which plain trio's server does not survive.
    for fd, sock in socks.items():
        sock.setblocking(True)
        while not answer(fd):
            pass
        sock.close()
    poller.close()
    return Round(cpu_us=cpu / done * 1e6, rate=done / elapsed)


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--size", type=int, default=64, help="bytes a message")
    parser.add_argument("--seconds", type=float, default=1.5, help="a round of one server")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", help="a server's name; may be repeated")
    options = parser.parse_args()

    server_core, load_core = two_cores()
    if load_core is not None:
        os.sched_setaffinity(0, {load_core})
    servers = start_servers(SERVERS, tuple(options.only or NAMES), server_core)
    rounds: dict[str, list[Round]] = {server.name: [] for server in servers}
    try:
        for _ in range(options.rounds):
            for server in servers:
                rounds[server.name].append(
                    drive(server, options.connections, options.size, options.seconds)
                )
    finally:
        for server in servers:
            server.stop()

    print(
        f"{options.size}-byte echo, {options.connections} connections, medians of "
        f"{options.rounds} interleaved rounds; Python {platform.python_version()}, "
        f"trio {trio.__version__}, {platform.system()} {platform.release()}, "
        f"{os.cpu_count()} cores"
    )
    base = {name: statistics.median(r.cpu_us for r in rs) for name, rs in rounds.items()}
    titles = (("server", -24), ("CPU us/trip", 12), ("trips/s", 10))
    titles += (("x asyncio Protocol", 20), ("x plain trio", 14))
    print("".join(t.ljust(-width) if width < 0 else t.rjust(width) for t, width in titles))
    for name, cpu in base.items():
        rate = statistics.median(r.rate for r in rounds[name])
        ratios = "".join(
            f"{cpu / base[peer]:>{width}.2f}" if peer in base else f"{'':>{width}}"
            for peer, width in (("asyncio Protocol", 20), ("trio serve_tcp", 14))
        )
        print(f"{name:24}{cpu:>12.1f}{rate:>10,.0f}{ratios}")


if __name__ == "__main__":
    main()
