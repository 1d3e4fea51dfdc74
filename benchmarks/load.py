"""The load generator in Python, for machines without a C compiler or without OpenSSL's headers: the
kinds, names and output of load.c, whose head explains them. It needs more CPU for a request than
most servers, so what it finds of rates and times is its own limit. The servers' CPU for each
request is not comparable either: they wait for it, and a server that is loaded in part finds less
to do at each wake-up.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

PONG = b"+PONG\r\n"
BLOCK = bytes(65536)
CHUNK = 1 << 18
PATIENCE = 20.0


@dataclass
class Options:
    """What the command line said."""

    kind: str
    port: int = 0
    pid: int = 0
    conns: int = 1
    active: int = -1
    size: int = 64
    pipeline: int = 1
    framing: str = "raw"
    seconds: float = 1.0
    warmup: float = 0.2
    tls: int = 0


@dataclass(eq=False)
class Conn:
    """One connection."""

    sock: socket.socket
    waiting: int = 0
    begun: float = 0.0


@dataclass
class Window:
    """What is counted."""

    done: int = 0
    samples: list[float] = field(default_factory=list)


def fail(text: str) -> None:
    """End with a line of explanation."""
    raise SystemExit(f"load: {text}")


def server_cpu(pid: int) -> float:
    """CPU seconds of process *pid*."""
    return time.clock_gettime(~pid << 3 | 2) if pid else 0.0


class Load:
    """One run of one kind."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.poller = select.epoll()
        self.conns: dict[int, Conn] = {}
        self.window = Window()
        self.stopping = False
        # Requests, or deliveries, that have not been answered.
        self.in_flight = 0
        self.burst, self.answer_size = self._burst()
        # Whether it is the right server is not what is measured.
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if options.tls else None
        if self.tls is not None:
            self.tls.check_hostname = False
            self.tls.verify_mode = ssl.CERT_NONE

    def _burst(self) -> tuple[bytes, int]:
        options = self.options
        messages = []
        for number in range(options.pipeline):
            message = bytes([ord("a") + number % 26]) * options.size
            if options.framing == "line":
                message = message[:-2] + b"\r\n"
            elif options.framing == "length":
                message = struct.pack(">i", len(message)) + message
            messages.append(message)
        burst = b"".join(messages)
        answers = PONG * len(messages) if options.framing == "line" else burst
        return burst, len(answers)

    def connect(self) -> Conn:
        """One connection more."""
        sock = socket.create_connection(("127.0.0.1", self.options.port), PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.tls is not None:
            sock = self.tls.wrap_socket(sock)
        conn = Conn(sock)
        self.conns[sock.fileno()] = conn
        return conn

    def watch(self, conn: Conn, events: int) -> None:
        """From now on it is polled, and does not block."""
        conn.sock.setblocking(False)
        self.poller.register(conn.sock, events)

    def receive(self, conn: Conn) -> int:
        """How many bytes came."""
        try:
            data = conn.sock.recv(CHUNK)
            # No event tells of what OpenSSL has left.
            while isinstance(conn.sock, ssl.SSLSocket) and conn.sock.pending():
                data += conn.sock.recv(CHUNK)
        except (BlockingIOError, ssl.SSLWantReadError):
            return 0
        if not data:
            fail("the server closed a connection")
        return len(data)

    def run(self, step: Callable[[Conn], None], more: Callable[[], bool]) -> None:
        """Step with what is ready, while there is more."""
        last = time.perf_counter()
        while more():
            events = self.poller.poll(0.1)
            now = time.perf_counter()
            if events:
                last = now
            elif now - last > PATIENCE:
                fail(f"no answer within {PATIENCE:g} s")
            for fd, _ in events:
                step(self.conns[fd])

    def run_for(self, seconds: float, step: Callable[[Conn], None]) -> None:
        """Step for a while."""
        until = time.perf_counter() + seconds
        self.run(step, lambda: time.perf_counter() < until)

    def measure(self, step: Callable[[Conn], None]) -> None:
        """Warm up, measure, and print."""
        options = self.options
        self.run_for(options.warmup, step)
        self.window = window = Window()
        server, own = server_cpu(options.pid), time.process_time()
        begun = time.perf_counter()
        self.run_for(options.seconds, step)
        seconds = time.perf_counter() - begun
        server, own = server_cpu(options.pid) - server, time.process_time() - own
        samples = sorted(window.samples)

        def percentile(share: float) -> float:
            return samples[math.floor(share * (len(samples) - 1))] * 1e6 if samples else 0.0

        result = {
            "count": window.done,
            "seconds": seconds,
            "server_cpu": server,
            "load_cpu": own,
            "p50": percentile(0.5),
            "p99": percentile(0.99),
        }
        print(json.dumps(result), flush=True)

    def finish(self, step: Callable[[Conn], None]) -> None:
        """Take the answers that are on their way: to close before would be a reset."""
        self.stopping = True
        self.run(step, lambda: self.in_flight > 0)

    # -- the kinds

    def echo(self) -> None:
        """Requests and their answers."""
        options = self.options
        everybody = [self.connect() for _ in range(options.conns)]
        for conn in everybody:
            self.check_echo(conn)
        active = options.active if 0 <= options.active <= options.conns else options.conns
        chosen = everybody[:: options.conns // active][:active]
        for conn in chosen:
            self.watch(conn, select.EPOLLIN)
        for conn in chosen:
            self.ask(conn)
        self.measure(self.echo_step)
        self.finish(self.echo_step)

    def check_echo(self, conn: Conn) -> None:
        """One round trip: the server has the connection, and does what it is measured for."""
        conn.sock.sendall(self.burst)
        answer = b""
        while len(answer) < self.answer_size:
            data = conn.sock.recv(CHUNK)
            if not data:
                fail("no answer")
            answer += data
        line = self.options.framing == "line"
        if not (answer.startswith(PONG) if line else answer == self.burst):
            fail("a wrong answer")

    def send(self, conn: Conn, data: bytes) -> None:
        """All of it, if the server reads."""
        view = memoryview(data)
        while view:
            try:
                view = view[conn.sock.send(view) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                room = select.poll()
                room.register(conn.sock, select.POLLOUT)
                if not room.poll(PATIENCE * 1000):
                    fail(f"nothing is read within {PATIENCE:g} s")

    def ask(self, conn: Conn) -> None:
        """Begin a burst."""
        conn.waiting = self.answer_size
        conn.begun = time.perf_counter()
        self.in_flight += 1
        self.send(conn, self.burst)

    def answered(self, conn: Conn) -> bool:
        """Whether all of the answer is there, after what can be read now."""
        conn.waiting -= self.receive(conn)
        if conn.waiting < 0:
            fail("the server answered too much")
        return conn.waiting == 0

    def echo_step(self, conn: Conn) -> None:
        """Something of an answer is there."""
        if not self.answered(conn):
            return
        self.window.samples.append(time.perf_counter() - conn.begun)
        self.window.done += self.options.pipeline
        self.in_flight -= 1
        if not self.stopping:
            self.ask(conn)

    def connects(self) -> None:
        """Connections that come and go."""
        self.in_flight = self.options.conns
        for _ in range(self.options.conns):
            self.begin()
        self.measure(self.connect_step)
        self.finish(self.connect_step)

    def begin(self) -> None:
        """A connection, and its request."""
        begun = time.perf_counter()
        conn = self.connect()
        conn.begun = begun
        conn.waiting = self.answer_size
        self.watch(conn, select.EPOLLIN)
        self.send(conn, self.burst)

    def connect_step(self, conn: Conn) -> None:
        """Something of the answer is there."""
        if not self.answered(conn):
            return
        del self.conns[conn.sock.fileno()]
        if isinstance(conn.sock, ssl.SSLSocket):
            # Ours says that it was all; its own does not matter.
            with suppress(ssl.SSLWantReadError):
                conn.sock.unwrap()
        conn.sock.close()
        self.window.samples.append(time.perf_counter() - conn.begun)
        self.window.done += 1
        if self.stopping:
            self.in_flight -= 1
        else:
            self.begin()

    def bulk(self, events: int, step: Callable[[Conn], None]) -> None:
        """One way."""
        for _ in range(self.options.conns):
            self.watch(self.connect(), events)
        self.measure(step)

    def sink_step(self, conn: Conn) -> None:
        """There is room for more."""
        with suppress(BlockingIOError):
            self.window.done += conn.sock.send(BLOCK)

    def source_step(self, conn: Conn) -> None:
        """Something came."""
        self.window.done += self.receive(conn)

    def broadcast(self) -> None:
        """One message to all, then the next."""
        self.burst = self.burst[:-1] + b"\n"
        crowd = [self.connect() for _ in range(self.options.conns)]
        for conn in crowd:
            self.watch(conn, select.EPOLLIN)
        self.meet(crowd)
        turn = 0
        begun = 0.0

        def say() -> None:
            nonlocal turn, begun
            sender = crowd[turn % len(crowd)]
            turn += 1
            for conn in crowd:
                conn.waiting = len(self.burst)
            self.in_flight = len(crowd)
            begun = time.perf_counter()
            self.send(sender, self.burst)

        def step(conn: Conn) -> None:
            conn.waiting -= self.receive(conn)
            if conn.waiting > 0:
                return
            if conn.waiting < 0:
                fail("a message too many")
            self.window.samples.append(time.perf_counter() - begun)
            self.window.done += 1
            self.in_flight -= 1
            if not self.in_flight and not self.stopping:
                say()

        say()
        self.measure(step)
        self.finish(step)

    def meet(self, crowd: list[Conn]) -> None:
        """Say something until everybody hears it: then the server has them all."""
        for _ in range(100):
            heard = 0
            self.send(crowd[-1], self.burst)
            while events := self.poller.poll(0.2):
                heard += sum(self.receive(self.conns[fd]) for fd, _ in events)
            if heard == len(crowd) * len(self.burst):
                return
        fail("the server does not broadcast to all")

    def hold(self) -> None:
        """Connections that do nothing, until stdin ends."""
        for _ in range(self.options.conns):
            self.check_echo(self.connect())
        print("ready", flush=True)
        sys.stdin.read()


def main() -> None:
    """Run what the command line says."""
    if len(sys.argv) < 2:
        fail("load.py KIND NAME=VALUE...: see the head of load.c")
    options = Options(sys.argv[1])
    for word in sys.argv[2:]:
        name, _, value = word.partition("=")
        if name == "kind" or not hasattr(options, name):
            fail(f"{name}: no such name")
        setattr(options, name, type(getattr(options, name))(value))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    load = Load(options)
    kinds: dict[str, Callable[[], None]] = {
        "echo": load.echo,
        "connect": load.connects,
        "sink": lambda: load.bulk(select.EPOLLOUT, load.sink_step),
        "source": lambda: load.bulk(select.EPOLLIN, load.source_step),
        "broadcast": load.broadcast,
        "hold": load.hold,
    }
    if options.kind not in kinds:
        fail(f"{options.kind}: no such kind")
    try:
        kinds[options.kind]()
    except OSError as error:
        fail(str(error))
    sys.stdout.flush()
    # Thousands of sockets are closed faster so.
    os._exit(0)


if __name__ == "__main__":
    main()
