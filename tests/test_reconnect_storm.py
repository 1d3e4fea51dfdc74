"""FAULTS 44 and 45: a crowd that loses its server together, and a server that accepts and closes.

The sockets are the test's own: connecting takes no time, and the test says what it meets. So
whatever time passes on the virtual clock is the backoff's.
"""

from __future__ import annotations

import errno
import random
import socket
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate, islice, pairwise
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.conftest import no_leaks
from trioreactor import Backoff, CloseReason, Connector, TcpClient, TcpConnection
from trioreactor.backoff import Jitter
from trioreactor.endpoints import ConnectAttempt

SERVER = ("192.0.2.1", 7)
OTHER = ("192.0.2.2", 7)

CLIENTS = 2000
# Each is another storm.
SEEDS = range(4)


class Network(trio.abc.SocketFactory):
    """Makes every socket of one trio run; of those that connect it keeps the peers."""

    def __init__(self) -> None:
        self.down = False
        self.open = 0
        # The ends that a server would have, with the address that was connected to.
        self.accepted: list[tuple[Any, socket.socket]] = []
        # Called with each, to do what that server does.
        self.serve: Any = None
        trio.socket.set_custom_socket_factory(self)

    def socket(
        self,
        family: socket.AddressFamily | int = socket.AF_INET,
        type: socket.SocketKind | int = socket.SOCK_STREAM,
        proto: int = 0,
    ) -> trio.socket.SocketType:
        """A socket that is not connected yet."""
        return NetworkSocket(self)


class NetworkSocket(trio.socket.SocketType):
    """The client's end: what `Connector` and `TcpConnection` ask of a socket, and no more."""

    family = socket.AF_INET
    type = socket.SOCK_STREAM
    proto = 0

    def __init__(self, network: Network) -> None:
        self._network = network
        self._peer: Any = None
        self._half: socket.socket | None = None
        self._closed = False
        network.open += 1

    async def connect(self, address: Any) -> None:
        await trio.lowlevel.checkpoint()
        if self._network.down:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        self._peer = address
        if self._network.serve is not None:
            self._half, far = socket.socketpair()
            self._half.setblocking(False)
            self._network.serve(address, far)

    def fileno(self) -> int:
        return self._half.fileno() if self._half is not None else -1

    def getsockname(self) -> Any:
        return ("192.0.2.99", 12345)

    def getpeername(self) -> Any:
        return self._peer

    def getsockopt(self, level: int, optname: int, buflen: int | None = None) -> Any:
        return 0

    def setsockopt(self, level: int, optname: int, value: Any, optlen: int | None = None) -> None:
        pass

    def shutdown(self, flag: int) -> None:
        if self._half is not None:
            self._half.shutdown(flag)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._network.open -= 1
            if self._half is not None:
                self._half.close()


# -- the storm


def seeded(seed: int, client: int, jitter: Jitter | float) -> Backoff:
    """The default backoff of one client, with chance of its own."""
    return Backoff(jitter=jitter, random=random.Random(f"{seed} {client}").random)


class Storm:
    """The times of many clients' attempts, since the loss of their server."""

    def __init__(self, attempts: list[list[float]]) -> None:
        self.attempts = attempts
        # The first and the second attempts are what the crowd cannot help.
        self.second_over = max(times[1] for times in attempts)
        self._times = sorted(t for times in attempts for t in times[2:])

    @classmethod
    def computed(cls, seed: int, jitter: Jitter | float, *, until: float) -> Storm:
        """The times that the backoff says, with no connector at all."""
        return cls(
            [
                list(take_until(accumulate(seeded(seed, client, jitter)), until))
                for client in range(CLIENTS)
            ]
        )
