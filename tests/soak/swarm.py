"""Clients of plain sockets, many in one process: ``python -m tests.soak.swarm PORT``.

Nothing of the library is used here. Obeys the commands of `Swarm`.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import ssl
import struct
import sys
import time
from typing import Any, cast

from tests.soak.server import HEAD, HOST, MESSAGE_SIZE, answer

# Linux: choose the port at connect, so that one port serves many destinations.
IP_BIND_ADDRESS_NO_PORT = 24


def percentiles(samples: list[float]) -> dict[str, float]:
    """Of *samples* in seconds, in milliseconds."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000

    return {"count": len(ordered), "p50": at(0.5), "p99": at(0.99), "max": ordered[-1] * 1000}


def careless() -> ssl.SSLContext:
    """A client's that trusts everybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Input:
    """Commands, without reading ahead of what was taken."""

    def __init__(self) -> None:
        self._rest = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ)

    def next(self) -> list[Any] | None:
        """The next command; None at the end."""
        while b"\n" not in self._rest:
            chunk = os.read(0, 65536)
            if not chunk:
                return None
            self._rest += chunk
        line, self._rest = self._rest.split(b"\n", 1)
        command: list[Any] = json.loads(line)
        return command

    def waiting(self) -> bool:
        """Whether there is one."""
        return bool(self._rest or self._selector.select(0))


class Swarm:
    """The commands."""

    def __init__(self, port: int, commands: Input) -> None:
        self._address = (HOST, port)
        self._commands = commands
        self._sockets: list[socket.socket] = []
        # Of the last `read`: each message's number and how many seconds old it was.
        self._ages: list[tuple[int, float]] = []

    def _new(self, source: str, receive_buffer: int | None) -> socket.socket:
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        # A closed connection keeps its pair of addresses for a minute: many rounds need many.
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((source, 0))
        return sock

    def open(self, number: int, source: str = HOST, receive_buffer: int | None = None) -> int:
        """Connect *number* more, one after the other."""
        for _ in range(number):
            sock = self._new(source, receive_buffer)
            sock.settimeout(60)
            sock.connect(self._address)
            self._sockets.append(sock)
        return len(self._sockets)

    def storm(self, number: int, source: str = HOST) -> int:
        """Connect *number* more, all at once. How many got through."""
        begun = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for _ in range(number):
                sock = self._new(source, None)
                sock.setblocking(False)
                sock.connect_ex(self._address)
                selector.register(sock, selectors.EVENT_WRITE)
            while selector.get_map() and time.monotonic() < begun + 60:
                for key, _ in selector.select(1):
                    sock = cast(socket.socket, key.fileobj)
                    selector.unregister(sock)
                    sock.settimeout(60)
                    self._sockets.append(sock)
        return sum(
            not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for sock in self._sockets
        )

    def stall(self, number: int, source: str = HOST) -> int:
        """Connect *number* more, all at once, of which each says half of TLS's hello or nothing."""
        connected = self.storm(number, source)
        hello = ssl.MemoryBIO()
        with contextlib.suppress(ssl.SSLWantReadError):
            careless().wrap_bio(ssl.MemoryBIO(), hello).do_handshake()
        half = hello.read(hello.pending // 2)
        for sock in self._sockets[::2]:
            sock.sendall(half)
        return connected

    def visit(self) -> dict[str, float]:
        """Connect, shake hands for TLS, have a byte echoed and leave, one after the other until the
        next command has come.
        """
        context = careless()
        samples = []
        while not self._commands.waiting():
            begun = time.monotonic()
            sock = socket.create_connection(self._address, 60)
            with context.wrap_socket(sock) as tls:
                tls.sendall(b"x")
                assert tls.recv(1) == b"x"
                samples.append(time.monotonic() - begun)
                tls.unwrap()
        return percentiles(samples)

    def echo(self, size: int, newest: int = 0) -> int:
        """All, or so many of the *newest*, send *size* bytes and get them back. How many came."""
        data = bytes(size)
        sockets = self._sockets[-newest:]
        for sock in sockets:
            sock.sendall(data)
        return sum(len(sock.recv(size, socket.MSG_WAITALL)) for sock in sockets)

    def close(self, resets: int) -> None:
        """Close all, the first *resets* with RST."""
        for n, sock in enumerate(self._sockets):
            if n < resets:
                linger = struct.pack("ii", 1, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            sock.close()
        self._sockets.clear()

    def read(self, messages: int) -> None:
        """Read so many messages on each connection. None may be missing or out of order."""
        self._ages.clear()
        expected = dict.fromkeys(self._sockets, 1)
        parts = dict.fromkeys(self._sockets, b"")
        with selectors.DefaultSelector() as selector:
            for sock in self._sockets:
                selector.register(sock, selectors.EVENT_READ)
            while len(self._ages) < messages * len(self._sockets):
                for key, _ in selector.select():
                    sock = cast(socket.socket, key.fileobj)
                    data = sock.recv(65536)
                    assert data, "the server has closed the connection of a healthy reader"
                    now = time.monotonic()
                    if parts[sock]:
                        data = parts[sock] + data
                    whole = len(data) - len(data) % MESSAGE_SIZE
                    for start in range(0, whole, MESSAGE_SIZE):
                        sent, number = HEAD.unpack_from(data, start)
                        assert number == expected[sock], "a message is missing"
                        expected[sock] += 1
                        self._ages.append((number, now - sent))
                    parts[sock] = data[whole:]

    def ages(self, first: int, last: int) -> dict[str, float]:
        """How old the messages numbered from *first* to *last* were when they were read."""
        return percentiles([age for number, age in self._ages if first <= number <= last])

    def burst(self, number: int) -> float:
        """On the first connection so many messages of one byte behind a length of four, and an
        empty one, whose answer it waits for. Seconds.
        """
        sock = self._sockets[0]
        begun = time.monotonic()
        sock.sendall(struct.pack(">i", 1).ljust(5, b"x") * number + struct.pack(">i", 0))
        assert sock.recv(4, socket.MSG_WAITALL) == bytes(4)
        return time.monotonic() - begun

    def stop(self) -> None:
        """What ends a `ping`, and visits."""

    def ping(self, size: int) -> dict[str, float]:
        """Round trips of *size* bytes on the first connection, until the next command has come."""
        sock = self._sockets[0]
        data = bytes(size)
        samples = []
        while not self._commands.waiting():
            begun = time.monotonic()
            sock.sendall(data)
            assert len(sock.recv(size, socket.MSG_WAITALL)) == size
            samples.append(time.monotonic() - begun)
        return percentiles(samples)


def main(port: str) -> None:
    """Obey until the end of the input."""
    commands = Input()
    swarm = Swarm(int(port), commands)
    while (command := commands.next()) is not None:
        name, *arguments = command
        answer(getattr(swarm, name)(*arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
