"""Happy Eyeballs: one connection to a host that has several addresses (RFC 8305)."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, zip_longest
from typing import Any

import trio

from trioreactor.address import format_address
from trioreactor.exception_groups import without_frames
from trioreactor.options import SocketOptions
from trioreactor.sockets import apply_to_connection, reset_on_close, stream_around

# How long one address is tried before the next is tried beside it. (RFC 8305, section 5)
ATTEMPT_DELAY = 0.25

# Linux 4.2; the socket module names it since Python 3.12.
_BIND_ADDRESS_NO_PORT: int | None = getattr(
    socket, "IP_BIND_ADDRESS_NO_PORT", 24 if sys.platform == "linux" else None
)

# A family and an address of it, as getaddrinfo gives them.
Target = tuple[int, Any]


async def connect_tcp(
    host: str,
    port: int,
    *,
    local_address: tuple[str, int] | None = None,
    socket_options: SocketOptions = SocketOptions(),
) -> trio.SocketStream:
    """Connect to the first of *host*'s addresses that answers.

    They are tried in the resolver's order, but the families take turns. Each has a quarter of a
    second before the next is tried, too; one that fails gives way at once. With *local_address*,
    an IP address and a port (0: any), only addresses of its family count.

    Raises `OSError`, or an `ExceptionGroup` of such, one for each address. Cancelled, or with one
    winner, it leaves no other socket open.
    """
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # A resolver may name an address twice.
    targets = list(dict.fromkeys((int(family), address) for family, _, _, _, address in found))
    if local_address is not None:
        family = _family_of(local_address[0])
        targets = [target for target in targets if target[0] == family]
        if not targets:
            raise OSError(
                errno.EAFNOSUPPORT,
                f"{host} has no address of the family of local_address={local_address[0]!r}",
            )
    if not targets:
        raise socket.gaierror(socket.EAI_NONAME, f"{host} has no address")
    race = _Race(local_address, socket_options)
    return stream_around(await race.run(_families_in_turn(targets)))


async def connect_unix(
    path: str, *, socket_options: SocketOptions = SocketOptions()
) -> trio.SocketStream:
    """Connect to the Unix socket at *path*. Raises `OSError`; cancelled, it leaves nothing open."""
    return stream_around(await _connect(socket.AF_UNIX, path, None, socket_options))


class _Race:
    """Connects to several addresses, the next whenever one has failed or had its time."""

    def __init__(self, local_address: tuple[str, int] | None, options: SocketOptions) -> None:
        self._local_address = local_address
        self._options = options
        self._winner: trio.socket.SocketType | None = None
        self._errors: list[OSError] = []

    async def run(self, targets: Sequence[Target]) -> trio.socket.SocketType:
        try:
            async with trio.open_nursery() as nursery:
                for target in targets:
                    failed = trio.Event()
                    nursery.start_soon(self._try, target, failed, nursery.cancel_scope)
                    with trio.move_on_after(ATTEMPT_DELAY):
                        await failed.wait()
        except BaseException:
            if self._winner is not None:
                self._winner.close()
            raise
        if self._winner is not None:
            return self._winner
        if len(self._errors) == 1:
            raise self._errors[0]
        raise ExceptionGroup("no address could be connected to", self._errors)

    async def _try(self, target: Target, failed: trio.Event, everybody: trio.CancelScope) -> None:
        family, address = target
        try:
            sock = await _connect(family, address, self._local_address, self._options)
        except OSError as error:
            # With its frames it would be a circle: they refer to this race, and it to the errors.
            self._errors.append(without_frames(error))
            failed.set()
            return  # noqa: ASYNC910 the task ends
        if self._winner is not None:
            # Another one was connected in the same turn of the loop.
            sock.close()
            return
        self._winner = sock
        everybody.cancel()


async def _connect(
    family: int,
    address: Any,
    local_address: tuple[str, int] | None,
    options: SocketOptions,
) -> trio.socket.SocketType:
    """One socket, connected to one address."""
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        # Before connect: the window scale and the user timeout count from the first packet.
        apply_to_connection(sock, options)
        if local_address is not None:
            await _bind(sock, local_address)
        try:
            await sock.connect(address)
        except OSError as error:
            raise _located(error, address) from None
        if family == socket.AF_UNIX:
            _refuse_full_backlog(sock, address)
        else:
            _refuse_self_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


async def _bind(sock: trio.socket.SocketType, local_address: tuple[str, int]) -> None:
    if local_address[1]:
        # Or the last connection's TIME_WAIT would keep the port for a minute.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    elif _BIND_ADDRESS_NO_PORT is not None:
        # Let connect choose the port: it knows the other end, so one port serves many ends.
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
    try:
        await sock.bind(local_address)
    except OSError as error:
        raise _located(error, local_address, "local address ") from None


def _located(error: OSError, address: Any, prefix: str = "") -> OSError:
    """The same error, with the address it is about as people write it."""
    if not error.errno or isinstance(error, socket.gaierror):
        return error
    return OSError(error.errno, f"{prefix}{format_address(address)}: {os.strerror(error.errno)}")


def _refuse_self_connect(sock: trio.socket.SocketType, address: Any) -> None:
    """Raise if *sock* is connected to itself.

    On loopback, where nobody listens on a port of the ephemeral range, the kernel may choose just
    that port for our end; TCP's simultaneous open then joins the socket with itself.
    """
    if sock.getsockname() == sock.getpeername():
        # With a FIN the port would stay in TIME_WAIT, and nobody could come to listen there.
        reset_on_close(sock)
        text = f"{format_address(address)}: connected to itself, for nobody listens there"
        raise ConnectionRefusedError(errno.ECONNREFUSED, text)


def _refuse_full_backlog(sock: trio.socket.SocketType, address: Any) -> None:
    """Raise if *sock* is not connected at all.

    To a Unix listener whose backlog is full, a connect that does not block says EAGAIN at once, for
    it is not under way. trio takes that for one that is, and finds no error in the end.
    """
    try:
        sock.getpeername()
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        raise _located(BlockingIOError(errno.EAGAIN, ""), address) from None


def _family_of(host: str) -> int:
    # A scope ("fe80::1%eth0") is no part of the family.
    version = ipaddress.ip_address(host.partition("%")[0]).version
    return socket.AF_INET if version == 4 else socket.AF_INET6


def _families_in_turn(targets: Sequence[Target]) -> list[Target]:
    """The same targets; two of one family stand together only when the other has no more.

    Else a dead family with many addresses would use up the whole time. (RFC 8305, section 4)
    """
    first = targets[0][0]
    pairs = zip_longest(
        [target for target in targets if target[0] == first],
        [target for target in targets if target[0] != first],
    )
    return [target for target in chain.from_iterable(pairs) if target is not None]
