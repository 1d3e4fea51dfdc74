"""The edge of the system: errno classes with their reasons, error translation, socket options."""

from __future__ import annotations

import errno
import math
import os
import socket
import ssl
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, overload

import trio

from trioreactor.errors import HandshakeFailed
from trioreactor.exception_groups import members
from trioreactor.options import Keepalive, SocketOptions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trioreactor.address import SocketAddress


def _errnos(*names: str) -> frozenset[int]:
    """The numbers of those names that this platform has."""
    return frozenset(getattr(errno, name) for name in names if hasattr(errno, name))


# accept(2): the connection that was waiting is gone or was refused by a rule, which says nothing
# about the listening socket. Linux hands the pending network errors of the new socket to accept;
# accept(2) asks for them to be treated like EAGAIN.
ACCEPT_PEER_ERRNOS = _errnos(
    "ECONNABORTED",  # it was reset while it waited (BSD; POSIX)
    "ECONNRESET",  # the same, on some systems
    "EPERM",  # a firewall rule forbade it
    "EPROTO",  # a protocol error on it
    "ENETDOWN",
    "ENOPROTOOPT",
    "EHOSTDOWN",
    "ENONET",
    "EHOSTUNREACH",
    "EOPNOTSUPP",
    "ENETUNREACH",
    "ENOSR",
    "ESOCKTNOSUPPORT",
    "EPROTONOSUPPORT",
    "ETIMEDOUT",
)

# accept(2): no descriptor was free, so one that is held back can be given up to shed a connection.
ACCEPT_DESCRIPTOR_ERRNOS = _errnos(
    "EMFILE",  # this process has no more
    "ENFILE",  # the whole system has no more
)

# accept(2): the kernel has no memory for a socket. Giving up a descriptor does not help; time may.
ACCEPT_MEMORY_ERRNOS = _errnos("ENOBUFS", "ENOMEM")

# What is left is a mistake in the listening socket itself (EBADF, EINVAL, ENOTSOCK, EFAULT): it
# cannot pass, so it surfaces.

# connect(2), and socket(2) and bind(2) before it: what another attempt would meet again. Everything
# else can pass: the server is started, the route comes back, a port or a descriptor comes free.
CONNECT_FINAL_ERRNOS = _errnos(
    "EACCES",  # not allowed: a Unix socket's mode, a firewall, a security module
    "EPERM",  # a firewall rule of this machine forbids it
    "EAFNOSUPPORT",  # this machine does not have the address family
    "EPROTONOSUPPORT",  # nor the protocol
    "EPROTOTYPE",  # the Unix socket there is of another type
    "EINVAL",  # an address that can be nobody's, such as a link-local one without its link
    "ENOTSOCK",  # the path is an ordinary file's (BSD; Linux says ECONNREFUSED)
    "ENAMETOOLONG",  # the path is too long
)

# getaddrinfo(3): the question itself is wrong. A name that is unknown may be known later, and a
# server that fails may answer.
RESOLVE_FINAL_ERRNOS = frozenset(
    getattr(socket, name)
    for name in ("EAI_BADFLAGS", "EAI_FAMILY", "EAI_SERVICE", "EAI_SOCKTYPE")
    if hasattr(socket, name)
)


def can_pass(error: BaseException) -> bool:
    """Whether another attempt to connect may succeed where this one met *error*.

    Of a group, one is enough: the addresses of a host fail each in its own way.
    """
    if (inner := members(error)) is not None:
        return any(map(can_pass, inner))
    if isinstance(error, ssl.SSLError):
        # Its errno is a number of OpenSSL's. A certificate that is not to be trusted stays so.
        return not isinstance(error, ssl.SSLCertVerificationError)
    if isinstance(error, socket.gaierror):
        return error.errno not in RESOLVE_FINAL_ERRNOS
    return isinstance(error, OSError) and error.errno not in CONNECT_FINAL_ERRNOS


class DataSocket(Protocol):
    """What the two halves of a connection call: a connected socket's own, or TLS above one."""

    def recv(self, bufsize: int, flags: int = ..., /) -> bytes: ...
    def send(self, data: bytes | bytearray | memoryview, /) -> int: ...
    def sendmsg(self, buffers: Iterable[bytes | bytearray | memoryview], /) -> int: ...
    def shutdown(self, how: int, /) -> None: ...
    def getsockopt(self, level: int, option: int, /) -> int: ...


class ConnectedSocket(DataSocket, Protocol):
    """The calls the library makes on a connected, non-blocking socket: the seam for simulation."""

    def fileno(self) -> int: ...
    def close(self) -> None: ...
    def detach(self) -> int: ...
    def getsockname(self) -> Any: ...
    @overload
    def getsockopt(self, level: int, option: int, /) -> int: ...
    @overload
    def getsockopt(self, level: int, option: int, buflen: int, /) -> bytes: ...
    def setsockopt(self, level: int, option: int, value: int | bytes, /) -> None: ...


def stdlib_twin(sock: trio.socket.SocketType) -> socket.socket:
    """A standard socket object on the same descriptor, whose owner stays *sock*.

    trio's socket object has no calls that answer at once, which the reactor needs. Before *sock*
    closes, the twin must be detached, or the descriptor would be closed twice.
    """
    return socket.socket(sock.family, sock.type, sock.proto, fileno=sock.fileno())


def stream_around(sock: socket.socket | trio.socket.SocketType) -> trio.SocketStream:
    """A trio stream on *sock*, with the options as they were: trio itself would set two."""
    before = [
        (option, sock.getsockopt(socket.IPPROTO_TCP, option))
        for option in (socket.TCP_NODELAY, getattr(socket, "TCP_NOTSENT_LOWAT", None))
        if option is not None and is_tcp(sock)
    ]
    if isinstance(sock, socket.socket):
        sock = trio.socket.from_stdlib_socket(sock)
    stream = trio.SocketStream(sock)
    for option, value in before:
        # Fails only on a connection that is gone, as trio's own attempt did.
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return stream


def peer_of(sock: socket.socket | trio.socket.SocketType) -> SocketAddress:
    """The other end's address; empty if the connection is gone already."""
    try:
        peer: SocketAddress = sock.getpeername()
    except OSError:
        # The first read or write will say so.
        return ""
    return peer


def peek(sock: DataSocket) -> bytes | None:
    """Something of what is unread, which stays unread; b"" at EOF; None if there is nothing.

    Raises `OSError` on a broken connection, and takes the kernel's note of the error by that.
    """
    try:
        return sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return None


def pending_error(sock: DataSocket) -> OSError | None:
    """The kernel's note of an error on *sock*, taken from it; None if it has none."""
    number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return OSError(number, os.strerror(number)) if number else None


def broken(error: OSError) -> trio.BrokenResourceError:
    """The one translation of what a connected socket can raise: the peer or the network did it."""
    # A connection remembers its error: the traceback's frames would hold the connection.
    error.__traceback__ = None
    wrapped = trio.BrokenResourceError(f"the connection broke: {error}")
    wrapped.__cause__ = error
    return wrapped


def handshake_failed(error: OSError) -> HandshakeFailed:
    """The same of what TLS's handshake can raise."""
    error.__traceback__ = None
    wrapped = HandshakeFailed(f"the TLS handshake failed: {error}")
    wrapped.__cause__ = error
    return wrapped


def is_tcp(sock: socket.socket | trio.socket.SocketType) -> bool:
    """Whether TCP's own options apply to *sock*."""
    return sock.family in (socket.AF_INET, socket.AF_INET6)


# Linux copies every option below from the listening socket to the accepted one, so setting it
# once on the listener saves the calls for each connection.
ACCEPTED_SOCKETS_INHERIT = sys.platform == "linux"


def apply_before_bind(sock: socket.socket, options: SocketOptions) -> None:
    """Set what must be set on a listening socket before it is bound."""
    if is_tcp(sock):
        # Restarting must not wait for old connections' TIME_WAIT. Not on Windows, where the
        # option means that anybody may take the port.
        if sys.platform != "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if options.reuse_port:
            if not hasattr(socket, "SO_REUSEPORT"):
                raise ValueError("SocketOptions(reuse_port=True): this platform has no such option")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if sock.family == socket.AF_INET6:
            # The same port is bound for IPv4 by a socket of its own.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    # The window scale is agreed in the handshake, so a receive buffer set later comes too late.
    apply_to_connection(sock, options)


def apply_to_connection(
    sock: socket.socket | trio.socket.SocketType, options: SocketOptions
) -> None:
    """Set what concerns a connection: on its socket, or on a listener for those it will accept."""
    if options.send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options.send_buffer)
    if options.receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options.receive_buffer)
    if not is_tcp(sock):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, options.no_delay)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, bool(options.keepalive))
    if isinstance(options.keepalive, Keepalive):
        timing = options.keepalive
        # macOS names the first one TCP_KEEPALIVE.
        idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))
        for option, value in (
            (idle, timing.idle),
            (getattr(socket, "TCP_KEEPINTVL", None), timing.interval),
            (getattr(socket, "TCP_KEEPCNT", None), timing.count),
        ):
            if option is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
    user_timeout = getattr(socket, "TCP_USER_TIMEOUT", None)
    if options.user_timeout is not None and user_timeout is not None:
        # The kernel counts in milliseconds, and 0 would mean its own default.
        milliseconds = max(1, math.ceil(options.user_timeout * 1000))
        sock.setsockopt(socket.IPPROTO_TCP, user_timeout, milliseconds)


def reset_on_close(sock: ConnectedSocket | trio.socket.SocketType) -> None:
    """Make the next close send RST and drop what is unsent, instead of FIN."""
    # Fails only where the connection is gone already, and then there is nothing to reset.
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class TcpInfo:
    """What the kernel knows of a TCP connection (Linux's TCP_INFO)."""

    state: int
    """The kernel's own state number (1 is ESTABLISHED)."""
    retransmits: int
    """Retransmissions of the current segment in a row."""
    probes: int
    """Unanswered keepalive or zero-window probes."""
    rtt: float
    """Smoothed round-trip time, seconds."""
    rtt_variance: float
    """Its variance, seconds."""
    send_mss: int
    """Largest segment we send, bytes."""
    congestion_window: int
    """Segments that may be in flight."""
    unacknowledged: int
    """Segments in flight."""
    lost: int
    """Segments taken for lost."""
    total_retransmits: int
    """Segments retransmitted since the connection began."""


# struct tcp_info (linux/tcp.h): eight bytes of small fields, then 32-bit counters.
_TCP_INFO = struct.Struct("=8B24I")


def read_tcp_info(sock: ConnectedSocket) -> TcpInfo | None:
    """TCP_INFO of *sock*, or None where there is none (Unix sockets, other platforms)."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None or sys.platform != "linux":
        return None
    try:
        raw = sock.getsockopt(socket.IPPROTO_TCP, option, _TCP_INFO.size)
    except OSError:
        return None
    if len(raw) < _TCP_INFO.size:
        return None
    f = _TCP_INFO.unpack(raw)
    state, _ca, retransmits, probes = f[:4]
    words = f[8:]
    return TcpInfo(
        state=state,
        retransmits=retransmits,
        probes=probes,
        send_mss=words[2],
        unacknowledged=words[4],
        lost=words[6],
        rtt=words[15] / 1e6,
        rtt_variance=words[16] / 1e6,
        congestion_window=words[18],
        total_retransmits=words[23],
    )
