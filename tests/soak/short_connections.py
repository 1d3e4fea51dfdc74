"""Short connections by the thousand, in a process of their own: ``python -m
tests.soak.short_connections PORT``.

Plain sockets, by threads. Each connection asks a `who` server (tests/programs/served.py) one
question and reads the answer. Obeys the commands of `Clients`.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections import Counter
from itertools import count
from typing import Any

from tests.soak.server import HOST, answer
from tests.soak.swarm import IP_BIND_ADDRESS_NO_PORT, Input, percentiles

THREADS = 8
# Seconds for one connection, on a busy machine.
PATIENCE = 20


class Clients:
    """What became of each connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._lock = threading.Lock()
        self._outcomes: Counter[str] = Counter()
        self._servers: Counter[str] = Counter()
        self._seconds: list[float] = []
        self._wanted = 0
        self._begun = count()

    def begin(self, wanted: int) -> None:
        """Make so many connections, and do not wait for them."""
        self._wanted = wanted
        for n in range(THREADS):
            threading.Thread(target=self._work, args=[f"127.0.0.{n + 2}"], daemon=True).start()

    def done(self) -> dict[str, Any]:
        """What came of them so far: outcomes, who answered, and how long it took."""
        with self._lock:
            return {
                "count": sum(self._outcomes.values()),
                "outcomes": self._outcomes,
                "servers": self._servers,
                "ms": percentiles(self._seconds) if self._seconds else {},
            }

    def _work(self, source: str) -> None:
        while next(self._begun) < self._wanted:
            begun = time.monotonic()
            try:
                outcome, server = "answered", self._ask(source)
            except (OSError, EOFError) as error:
                outcome, server = type(error).__name__, ""
            with self._lock:
                self._outcomes[outcome] += 1
                self._seconds.append(time.monotonic() - begun)
                if server:
                    self._servers[server] += 1

    def _ask(self, source: str) -> str:
        with socket.socket() as sock:
            sock.settimeout(PATIENCE)
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((source, 0))
            sock.connect((HOST, self._port))
            sock.sendall(b"who\n")
            line = b""
            while not line.endswith(b"\n"):
                data = sock.recv(100)
                if not data:
                    raise EOFError
                line += data
            return line.decode().strip()


def main(port: str) -> None:
    """Obey until the end of the input."""
    commands = Input()
    clients = Clients(int(port))
    while (command := commands.next()) is not None:
        name, *arguments = command
        answer(getattr(clients, name)(*arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
