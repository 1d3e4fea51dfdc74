"""Opening listening sockets: TCP on both families at once, Unix sockets with their files, and
whatever a bind address names.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import Any

import trio

from trioreactor.acceptor import DEFAULT_BATCH, Acceptor
from trioreactor.address import format_address
from trioreactor.bind_address import parse_bind_address
from trioreactor.inherited import take_descriptors
from trioreactor.options import SocketOptions
from trioreactor.sockets import apply_before_bind

# More than any system's own bound, which it is cut to. (trio does the same)
_LARGEST_BACKLOG = 65535

# How often a free port of the first family may turn out to be taken in the second.
_PORT_TRIES = 20

# A family that this machine does not have: no IPv6 in the kernel, or no address of it.
_NO_SUCH_FAMILY = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT})


async def open_acceptors(
    *bind: str,
    mode: int | None = None,
    socket_options: SocketOptions = SocketOptions(),
    batch: int | None = DEFAULT_BATCH,
) -> list[Acceptor]:
    """Listen on each address in *bind*, written as for a command line; all of them, or none.

    - ``127.0.0.1:7000``, ``localhost:7000``, ``[::1]:7000``; ``:7000`` is every address, IPv4
      and IPv6 alike: see `open_tcp_acceptors`, which may give several acceptors for one address;
    - ``unix:/run/x.sock``, with the file mode *mode*, or ``unix:@name``, an abstract name: see
      `open_unix_acceptor`;
    - ``fd://3``: a listening TCP or Unix stream socket that this process was started with. The
      acceptor owns it.

    The acceptors come in the order of *bind*. `TypeError` or `ValueError` for what is no address,
    and `InheritedSocketError` for a descriptor that cannot be it, before anything is opened;
    `OSError` for an address that cannot be bound. Then nothing is left open, and descriptors are
    left to the caller.
    """
    await trio.lowlevel.checkpoint()
    if not bind:
        raise ValueError('open_acceptors(): pass at least one address, as in "127.0.0.1:7000"')
    places = list(map(parse_bind_address, bind))
    descriptors = [place for place in places if isinstance(place, int)]
    inherited = dict(zip(descriptors, take_descriptors(descriptors, socket_options), strict=True))
    opened: list[list[Acceptor]] = []
    try:
        for place in places:
            match place:
                case int():
                    # Made when nothing can fail any more: an acceptor that closes, closes it.
                    opened.append([])
                case str():
                    opened.append(
                        [
                            await open_unix_acceptor(
                                place, mode=mode, socket_options=socket_options, batch=batch
                            )
                        ]
                    )
                case host, port:
                    opened.append(
                        await open_tcp_acceptors(
                            port, host=host, socket_options=socket_options, batch=batch
                        )
                    )
    except BaseException:
        for acceptor in chain.from_iterable(opened):
            acceptor.close()
        for sock in inherited.values():
            sock.detach()
        raise
    for place, acceptors in zip(places, opened, strict=True):
        if isinstance(place, int):
            sock = inherited[place]
            acceptors.append(Acceptor(sock, batch=batch, socket_options=socket_options))
    return list(chain.from_iterable(opened))


def open_sharing(
    acceptor: Acceptor,
    socket_options: SocketOptions = SocketOptions(),
    batch: int | None = DEFAULT_BATCH,
) -> Acceptor:
    """Another listening socket, with a queue of its own, on the port of *acceptor*, which must have
    been opened with `SocketOptions.reuse_port`. The kernel deals newcomers out among them.
    """
    family = acceptor.socket.family
    sock = _bind(family, acceptor.address, replace(socket_options, reuse_port=True))
    return Acceptor(sock, batch=batch, socket_options=socket_options)


async def open_tcp_acceptors(
    port: int,
    *,
    host: str | None = None,
    socket_options: SocketOptions = SocketOptions(),
    batch: int | None = DEFAULT_BATCH,
) -> list[Acceptor]:
    """Listen on *port* on every address of *host* (None: all of them), IPv4 and IPv6 alike.

    All share one port number, also when *port* is 0 and the system chooses it. A family that the
    machine lacks is left out. Raises `OSError`, with the address in its text, if any other
    address cannot be bound; then nothing is left open. `socket.gaierror` if *host* is unknown.
    """
    if isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"open_tcp_acceptors({port!r}): pass the port as a whole number")
    if not 0 <= port <= 65535:
        raise ValueError(f"open_tcp_acceptors({port}): pass a port from 0 to 65535")
    found = await trio.socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    # A resolver may name an address twice.
    places = list(
        dict.fromkeys((found_family, address) for found_family, _, _, _, address in found)
    )
    tries = 1 if port else _PORT_TRIES
    while True:
        tries -= 1
        try:
            socks = _bind_all(places, port, socket_options)
        except OSError as error:
            if not tries or error.errno != errno.EADDRINUSE:
                raise
        else:
            return [Acceptor(sock, batch=batch, socket_options=socket_options) for sock in socks]


def _bind_all(
    places: Sequence[tuple[int, tuple[Any, ...]]], port: int, options: SocketOptions
) -> list[socket.socket]:
    """A listening socket for each place, all on one port, or none at all."""
    socks: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, (host, _, *scope) in places:
            try:
                sock = _bind(family, (host, port, *scope), options)
            except OSError as error:
                if error.errno not in _NO_SUCH_FAMILY:
                    raise
                missing = error
            else:
                socks.append(sock)
                # What the system chose for the first is everybody's.
                port = sock.getsockname()[1]
        if not socks and missing is not None:
            raise missing
    except BaseException:
        for sock in socks:
            sock.close()
        raise
    return socks


def _bind(
    family: int,
    address: Any,
    options: SocketOptions,
    *,
    before: Callable[[socket.socket], object] | None = None,
    after: Callable[[socket.socket], object] | None = None,
) -> socket.socket:
    """A listening socket; *before* and *after* are called around bind."""
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            apply_before_bind(sock, options)
            if before is not None:
                before(sock)
            sock.bind(address)
            if after is not None:
                after(sock)
            sock.listen(_LARGEST_BACKLOG if options.backlog is None else options.backlog)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        text = f"cannot listen on {format_address(address)}: {error.strerror or error}"
        # Python's own complaints (a path too long) have no number.
        raise (OSError(error.errno, text) if error.errno else OSError(text)) from error
    return sock


async def open_unix_acceptor(
    path: str | os.PathLike[str],
    *,
    mode: int | None = None,
    socket_options: SocketOptions = SocketOptions(),
    batch: int | None = DEFAULT_BATCH,
) -> Acceptor:
    r"""Listen on a Unix socket at *path*, with the file mode *mode* (None: as the umask says).

    A socket file that nobody listens on any more is replaced; one with a live server, or a file
    that is no socket, is left alone and raises `OSError` (EADDRINUSE). At no moment is the file
    more open than *mode*. Closing the acceptor removes the file if it is still this one. A path
    that begins with ``"\0"`` is an abstract name, which has no file.
    """
    await trio.lowlevel.checkpoint()
    path = os.fspath(path)
    if path.startswith("\0"):
        sock = _bind(socket.AF_UNIX, path, socket_options)
        return Acceptor(sock, batch=batch, socket_options=socket_options)
    _remove_stale(path)

    def restrict(sock: socket.socket) -> None:
        # Linux makes the file with the socket's own mode, less the umask: never too open.
        if mode is not None and sys.platform == "linux":
            os.fchmod(sock.fileno(), mode)

    def set_mode(_sock: socket.socket) -> None:
        if mode is not None:
            os.chmod(path, mode)

    sock = _bind(socket.AF_UNIX, path, socket_options, before=restrict, after=set_mode)
    ours = _identity(path)

    def remove() -> None:
        with suppress(OSError):
            if _identity(path) == ours:
                os.unlink(path)

    return Acceptor(sock, batch=batch, socket_options=socket_options, on_close=remove)


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path, follow_symlinks=False)
    return found.st_dev, found.st_ino


def _remove_stale(path: str) -> None:
    """Remove a socket file whose server is gone; leave everything else to bind's own error."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A live server whose backlog is full would block.
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            # Not if another server has put its own there meanwhile.
            with suppress(OSError):
                if _identity(path) == (found.st_dev, found.st_ino):
                    os.unlink(path)
        except OSError:
            pass
