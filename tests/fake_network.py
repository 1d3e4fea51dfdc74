"""A network by script: names that resolve and sockets that connect as a test says, when it says."""

from __future__ import annotations

import errno
import math
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What becomes of one `connect`."""

    error: Exception | None = None
    """What it raises; None: it is connected."""
    after: float = 0.0
    """How many seconds later."""
    gate: trio.Event | None = None
    """When, if not by the clock: as the kernel wakes several sockets in one turn."""
    then: Callable[[], object] = field(default=lambda: None)
    """Called in the very turn in which it ends."""


CONNECTED = Answer()
HANGS = Answer(after=math.inf)


def failing(number: int, *, after: float = 0.0) -> Answer:
    """It fails by this errno."""
    return Answer(error=OSError(number, os.strerror(number)), after=after)


class FakeSocket(trio.socket.SocketType):
    """The calls that connecting makes on a socket."""

    def __init__(self, network: FakeNetwork, family: int) -> None:
        self._network = network
        self._family = socket.AddressFamily(family)
        self.calls: list[tuple[Any, ...]] = []
        self.bound: Any = None
        self.peer: Any = None
        self.lost = False
        self.closed = False

    @property
    def family(self) -> socket.AddressFamily:
        return self._family

    @property
    def type(self) -> socket.SocketKind:
        return socket.SOCK_STREAM

    def setsockopt(self, level: int, optname: int, value: Any = None, *rest: Any) -> None:
        self.calls.append(("setsockopt", level, optname, value))

    def getsockopt(self, level: int, optname: int, *rest: Any) -> Any:
        return 0

    async def bind(self, address: Any) -> None:
        self.calls.append(("bind", address))
        await trio.lowlevel.checkpoint()
        if self._network.bind_error is not None:
            raise self._network.bind_error
        self.bound = address

    async def connect(self, address: Any) -> None:
        self.calls.append(("connect", address))
        answer = self._network.asked(address)
        if answer.gate is not None:
            await answer.gate.wait()
        else:
            await trio.sleep(answer.after)
        answer.then()
        if answer.error is not None:
            raise answer.error
        self.peer = address

    def getpeername(self) -> Any:
        if self.lost:
            raise OSError(errno.ENOTCONN, "not connected")
        return self.peer

    def getsockname(self) -> Any:
        return self.bound or ("192.0.2.250", 40000)

    def close(self) -> None:
        self.closed = True


class FakeNetwork(trio.abc.SocketFactory, trio.abc.HostnameResolver):
    """All sockets that this trio run makes from now on, and all names that it asks for."""

    def __init__(self) -> None:
        self.answers: dict[Any, list[Answer]] = {}
        """What connecting to ``(ip, port)``, or to a path, comes to: the next time, the time after,
        ... The last one stays. Who is not here refuses."""
        self.names: dict[str, Sequence[str] | Exception | None] = {}
        """The IP addresses of a name, or what the resolver raises; None: it never answers."""
        self.socket_error: OSError | None = None
        """What making a socket raises."""
        self.bind_error: OSError | None = None
        """What binding one raises."""
        self.sockets: list[FakeSocket] = []
        self.tried: list[tuple[float, Any]] = []
        """Each address that was connected to, and when."""
        trio.socket.set_custom_socket_factory(self)
        trio.socket.set_custom_hostname_resolver(self)

    @property
    def open(self) -> list[FakeSocket]:
        """The sockets that nobody has closed."""
        return [sock for sock in self.sockets if not sock.closed]

    def asked(self, address: Any) -> Answer:
        """What *address* answers this time."""
        place = address if isinstance(address, str) else tuple(address[:2])
        self.tried.append((trio.current_time(), place))
        answers = self.answers.get(place)
        if not answers:
            return failing(errno.ECONNREFUSED)
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def socket(self, family: int = 0, type: int = 0, proto: int = 0) -> FakeSocket:  # noqa: A002
        if self.socket_error is not None:
            raise self.socket_error
        sock = FakeSocket(self, family)
        self.sockets.append(sock)
        return sock

    async def getaddrinfo(self, host: Any, port: Any, *hints: Any) -> Any:
        """What `names` says."""
        await trio.lowlevel.checkpoint()
        answer = self.names[host.decode()]
        if answer is None:
            await trio.sleep_forever()
        if isinstance(answer, Exception):
            raise answer
        return [
            (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address)
            for ip in answer or ()
            for family, address in [
                (socket.AF_INET6, (ip, port, 0, 0)) if ":" in ip else (socket.AF_INET, (ip, port))
            ]
        ]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        """Nobody asks."""
        raise AssertionError(sockaddr)


class Resolver(trio.abc.HostnameResolver):
    """Beside real sockets: every name of this trio run has the addresses *answer*, or raises it, or
    has no answer (None)."""

    def __init__(self, answer: list[str] | Exception | None) -> None:
        self.answer = answer
        self.asked = 0
        trio.socket.set_custom_hostname_resolver(self)

    async def getaddrinfo(self, host: Any, port: Any, *hints: Any) -> Any:
        """What `answer` says."""
        self.asked += 1
        await trio.lowlevel.checkpoint()
        if self.answer is None:
            await trio.sleep_forever()
        if isinstance(self.answer, Exception):
            raise self.answer
        return [
            found
            for ip in self.answer or ()
            for found in socket.getaddrinfo(ip, port, type=socket.SOCK_STREAM)
        ]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        """Nobody asks."""
        raise AssertionError(sockaddr)
