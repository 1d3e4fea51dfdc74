"""How long a chat server takes to bring a message to all its clients, and what CPU that costs:
trioreactor beside the same server on asyncio's streams, with and without uvloop, in one run.

Now one client and now another sends a message, at even intervals, whether or not the ones before
have arrived. The time runs from there to when the load is told that it can be received, for every
receiver. Every server runs in a process of its own on one core, the load on
another; how busy the load was is printed, for one that has no time left would measure itself. The
rounds are interleaved, so that a disturbance of the machine meets all: the percentiles are medians
of those of the rounds.

    python benchmarks/chat_broadcast.py [--clients 1000] [--size 100] [--rate 20]
                                        [--seconds 4] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import select
import socket
import statistics
import struct
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import trio
from server_process import ServerProcess, start_servers, two_cores

PROGRAM = Path(__file__).with_name("chat_servers.py")
NAMES = ("trioreactor", "asyncio streams", "uvloop streams")
BASE = "asyncio streams"
# The length, and the number of the message.
HEAD = struct.Struct(">iq")
PATIENCE = 20.0


@dataclass
class Round:
    """What one round of one server gave."""

    p50: float
    """Milliseconds, as the two others."""
    p99: float
    p999: float
    cpu_us: float
    """Server CPU (user and system) per delivered message."""
    load: float
    """Share of its core that the load used."""


class Clients:
    """Plain sockets, and what they have received."""

    def __init__(self, port: int, count: int, size: int) -> None:
        self.frame_size = 4 + size
        self.poller = select.epoll()
        self.socks: dict[int, socket.socket] = {}
        # The beginnings of messages that have not come in full.
        self.partial: dict[int, bytes] = {}
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)
            self.socks[sock.fileno()] = sock
            self.poller.register(sock, select.EPOLLIN)
        self.senders = list(self.socks.values())
        # When each message was sent, by its number, and how long those from *first* on took.
        self.sent: list[float] = []
        self.first = 0
        self.delays: list[float] = []

    def send(self) -> None:
        """Let the next client send the next message."""
        number = len(self.sent)
        frame = HEAD.pack(self.frame_size - 4, number).ljust(self.frame_size, b"x")
        self.sent.append(time.perf_counter())
        assert self.senders[-1 - number % len(self.senders)].send(frame) == len(frame)

    def receive(self, timeout: float) -> bool:
        """Take what has come, after waiting for something for at most *timeout* seconds."""
        events = self.poller.poll(timeout, len(self.socks))
        now = time.perf_counter()
        socks, sent, size = self.socks, self.sent, self.frame_size
        for fd, _ in events:
            data = socks[fd].recv(65536)
            assert data, "the server closed a connection"
            if fd in self.partial:
                data = self.partial.pop(fd) + data
            whole = len(data) // size * size
            for start in range(0, whole, size):
                length, number = HEAD.unpack_from(data, start)
                assert length == size - 4
                if number >= self.first:
                    self.delays.append(now - sent[number])
            if whole < len(data):
                self.partial[fd] = data[whole:]
        return bool(events)

    def meet(self) -> None:
        """Wait until the server has taken all of them: until a message comes to everybody."""
        for _ in range(50):
            self.start()
            self.send()
            while self.receive(0.5) and len(self.delays) < len(self.socks):
                pass
            if len(self.delays) == len(self.socks):
                return
        raise RuntimeError("the server does not broadcast to all")

    def start(self) -> None:
        """Forget the deliveries so far."""
        self.first = len(self.sent)
        self.delays.clear()

    def chat(self, messages: int, interval: float) -> None:
        """Send so many, at even intervals, and wait until all have come to everybody."""
        self.start()
        begun = time.perf_counter()
        sent = 0
        while len(self.delays) < messages * len(self.socks):
            now = time.perf_counter()
            if sent == messages:
                assert now < begun + messages * interval + PATIENCE, "messages were lost"
                self.receive(0.1)
            elif now >= begun + sent * interval:
                self.send()
                sent += 1
            else:
                self.receive(begun + sent * interval - now)

    def close(self) -> None:
        """Close all."""
        self.poller.close()
        for sock in self.socks.values():
            sock.close()


def drive(server: ServerProcess, count: int, size: int, rate: float, seconds: float) -> Round:
    """Let them chat for a while."""
    clients = Clients(server.port, count, size)
    clients.meet()
    cpu, load, begun = server.cpu_seconds(), time.process_time(), time.perf_counter()
    clients.chat(max(1, round(rate * seconds)), 1 / rate)
    cpu, load = server.cpu_seconds() - cpu, time.process_time() - load
    elapsed = time.perf_counter() - begun
    clients.close()
    delays = sorted(clients.delays)

    def percentile(share: float) -> float:
        return delays[min(len(delays) - 1, int(len(delays) * share))] * 1e3

    return Round(
        p50=percentile(0.5),
        p99=percentile(0.99),
        p999=percentile(0.999),
        cpu_us=cpu / len(delays) * 1e6,
        load=load / elapsed,
    )


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--size", type=int, default=100, help="bytes a message, at least 12")
    parser.add_argument("--rate", type=float, default=20.0, help="messages a second, of all")
    parser.add_argument("--seconds", type=float, default=4.0, help="a round of one server")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", help="a server's name; may be repeated")
    options = parser.parse_args()
    if options.size < HEAD.size:
        parser.error(f"--size: at least {HEAD.size} bytes")

    # Inherited by the servers. Some more than the clients: standard streams, listener, poller.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < options.clients + 32:
        parser.error(f"--clients: only {most} descriptors are allowed (ulimit -n)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    server_core, load_core = two_cores()
    if load_core is not None:
        os.sched_setaffinity(0, {load_core})
    with ExitStack() as stack:
        servers = start_servers(PROGRAM, options.only or NAMES, server_core, stack)
        rounds: dict[str, list[Round]] = {server.name: [] for server in servers}
        for _ in range(options.rounds):
            for server in servers:
                rounds[server.name].append(
                    drive(server, options.clients, options.size, options.rate, options.seconds)
                )

    print(
        f"{options.size}-byte messages, {options.rate:g} a second, to {options.clients} clients "
        f"each, medians of {options.rounds} interleaved rounds; "
        f"Python {platform.python_version()}, trio {trio.__version__}, "
        f"{platform.system()} {platform.release()}, {os.cpu_count()} cores"
    )
    columns = ("p50 ms", "p99 ms", "p99.9 ms", "CPU us/delivery", f"x {BASE}", "load's core")
    print(f"{'server':18}" + "".join(f"{column:>18}" for column in columns))
    medians = {
        name: [
            statistics.median(values)
            for values in zip(*((r.p50, r.p99, r.p999, r.cpu_us, r.load) for r in rs), strict=True)
        ]
        for name, rs in rounds.items()
    }
    for name, (p50, p99, p999, cpu, load) in medians.items():
        ratio = f"{cpu / medians[BASE][3]:.2f}" if BASE in medians else ""
        print(f"{name:18}{p50:>18.2f}{p99:>18.2f}{p999:>18.2f}{cpu:>18.2f}{ratio:>18}{load:>18.0%}")


if __name__ == "__main__":
    main()
