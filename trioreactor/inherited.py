"""Listening sockets that another program has opened and handed over: systemd and its like."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Sequence

from trioreactor.acceptor import DEFAULT_BATCH, Acceptor
from trioreactor.errors import InheritedSocketError
from trioreactor.options import SocketOptions
from trioreactor.sockets import apply_to_connection

# sd_listen_fds(3): SD_LISTEN_FDS_START, behind stdin, stdout and stderr.
_FIRST_DESCRIPTOR = 3

# Bounds for what may be nonsense: more digits than a PID has, more descriptors than anybody hands
# over.
_MOST_DIGITS = 10
_MOST_DESCRIPTORS = 65536

# sd_listen_fds(3): what a descriptor is called that nobody has named.
_UNNAMED = "unknown"

# The last one is systemd's since version 259: the PID by another name.
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")

_FAMILIES = {socket.AF_INET, socket.AF_INET6, getattr(socket, "AF_UNIX", socket.AF_INET)}

# What came with this process and has not been asked for yet: descriptors and their names. The
# descriptors belong to the process, so what is known of them does, too.
_waiting: list[tuple[int, str]] = []
# The values that it was read from, where they have been left in the environment.
_read_from: list[str | None] = []


def inherited_acceptors(
    *,
    name: str | None = None,
    socket_options: SocketOptions = SocketOptions(),
    batch: int | None = DEFAULT_BATCH,
    unset_environment: bool = True,
) -> list[Acceptor]:
    """Acceptors on the listening sockets that this process was started with, in their order.

    This is systemd's protocol, sd_listen_fds(3): ``LISTEN_FDS`` says how many there are, from
    descriptor 3 on, ``LISTEN_FDNAMES`` what they are called (a unit's ``FileDescriptorName=``)
    and ``LISTEN_PID`` whom they are for; there are none if that is another process. With *name*,
    only those of that name. Each is given out once, so a later call gives what is left. They are
    set non-blocking, and no child process inherits them.

    *socket_options* are set for accepted connections; `reuse_port` and `backlog` are the business
    of whoever has bound the socket. Closing an acceptor on a Unix socket leaves its file alone,
    for that is not ours, either.

    The variables are removed from the environment, so that no child takes them for its own, unless
    *unset_environment* is False. `InheritedSocketError`, which says which descriptor is wrong, if
    one of those asked for is no listening stream socket; then none is taken.
    """
    _look(unset_environment)
    wanted = [fd for fd, its_name in _waiting if name is None or its_name == name]
    socks = _sockets_on(wanted, socket_options)
    return [Acceptor(sock, batch=batch, socket_options=socket_options) for sock in socks]


def take_descriptors(
    descriptors: Sequence[int], socket_options: SocketOptions
) -> list[socket.socket]:
    """Socket objects that own these descriptors, which listen; no child process inherits them.

    `inherited_acceptors` will not give them out, too. `InheritedSocketError` if one is of no use;
    then none is owned.
    """
    if descriptors:
        _look(unset_environment=True)
    return _sockets_on(descriptors, socket_options)


def _sockets_on(descriptors: Iterable[int], socket_options: SocketOptions) -> list[socket.socket]:
    socks: list[socket.socket] = []
    try:
        for fd in descriptors:
            if any(fd == sock.fileno() for sock in socks):
                raise InheritedSocketError(
                    f"descriptor {fd}: it was named twice; pass each one once", fd, errno.EINVAL
                )
            socks.append(_listening_socket(fd))
        for sock in socks:
            sock.set_inheritable(False)
            apply_to_connection(sock, socket_options)
    except BaseException:
        for sock in socks:
            sock.detach()
        raise
    taken = {sock.fileno() for sock in socks}
    _waiting[:] = [entry for entry in _waiting if entry[0] not in taken]
    return socks


def _listening_socket(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        what = "it is not open" if error.errno == errno.EBADF else f"it is no socket ({error})"
        raise _useless(fd, what, error.errno) from error
    problem = None
    if sock.family not in _FAMILIES:
        problem = f"it is no TCP or Unix socket, but of {sock.family!r}"
    elif sock.type != socket.SOCK_STREAM:
        problem = f"it is no stream socket, but of {sock.type!r}"
    elif not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        problem = "it is a stream socket that does not listen"
    if problem is not None:
        sock.detach()
        raise _useless(fd, problem, errno.EINVAL)
    return sock


def _useless(fd: int, problem: str, number: int | None) -> InheritedSocketError:
    return InheritedSocketError(
        f"descriptor {fd}: {problem}; pass a listening TCP or Unix stream socket", fd, number
    )


def _look(unset_environment: bool) -> None:
    """Take note of what the environment tells of, if it has not been noted yet."""
    values = [os.environ.get(variable) for variable in _VARIABLES]
    new = values[:2] != [None, None] and values != _read_from
    if unset_environment:
        for variable in _VARIABLES:
            os.environ.pop(variable, None)
    if new:
        _waiting[:] = _parse(*values[:3])
    _read_from[:] = [] if unset_environment else values
    if new:
        for fd, _ in _waiting:
            # Those that nobody asks for are to stay with this process, too. One that is not open
            # is reported when it is asked for.
            try:
                os.set_inheritable(fd, False)
            except OSError:
                continue


def _parse(pid: str | None, count: str | None, names: str | None) -> list[tuple[int, str]]:
    if pid is None or count is None:
        return []
    for variable, value in (("LISTEN_PID", pid), ("LISTEN_FDS", count)):
        if not (value.isascii() and value.isdigit() and len(value) <= _MOST_DIGITS):
            raise InheritedSocketError(
                f"{variable}={value!r}: this is no number; remove it, or start this program by "
                "what sets it"
            )
    if int(pid) != os.getpid():
        return []
    number = min(int(count), _MOST_DESCRIPTORS)
    # Missing ones are unnamed, and surplus ones are nobody's.
    called = [part or _UNNAMED for part in (names or "").split(":")]
    called += [_UNNAMED] * (number - len(called))
    return list(zip(range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + number), called, strict=False))
