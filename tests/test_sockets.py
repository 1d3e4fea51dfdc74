"""The edge of the system: classes of errors, options on real sockets, what the kernel knows."""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.conftest import open_descriptors, refusing, reset, tcp_pair, unix_pair, until
from trioreactor import Keepalive, SocketOptions, TcpInfo, open_tcp_acceptors
from trioreactor.sockets import (
    ACCEPT_DESCRIPTOR_ERRNOS,
    ACCEPT_MEMORY_ERRNOS,
    ACCEPT_PEER_ERRNOS,
    ACCEPTED_SOCKETS_INHERIT,
    CONNECT_FINAL_ERRNOS,
    RESOLVE_FINAL_ERRNOS,
    apply_before_bind,
    apply_to_connection,
    broken,
    can_pass,
    is_tcp,
    peek,
    pending_error,
    read_tcp_info,
    reset_on_close,
    stdlib_twin,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="an option or promise of Linux")

CLASSES = [ACCEPT_PEER_ERRNOS, ACCEPT_DESCRIPTOR_ERRNOS, ACCEPT_MEMORY_ERRNOS]

EVERYTHING = SocketOptions(
    no_delay=True,
    keepalive=Keepalive(idle=33, interval=7, count=4),
    user_timeout=12.3456,
    send_buffer=32768,
    receive_buffer=16384,
    reuse_port=True,
)


def have_ipv6() -> bool:
    """Whether this machine has an IPv6 loopback."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


FAMILIES = [
    pytest.param(socket.AF_INET, id="IPv4"),
    pytest.param(
        socket.AF_INET6,
        id="IPv6",
        marks=pytest.mark.skipif(not have_ipv6(), reason="no IPv6 on this machine"),
    ),
]


@pytest.fixture(params=FAMILIES)
def tcp_socket(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    """A new TCP socket of each family."""
    with socket.socket(request.param, socket.SOCK_STREAM) as sock:
        yield sock


def linked(options: SocketOptions, family: int) -> tuple[socket.socket, socket.socket]:
    """A client and what a listening socket with *options* accepted for it."""
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        apply_before_bind(listener, options)
        listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        listener.listen()
        client = socket.create_connection(listener.getsockname()[:2])
        try:
            accepted, _ = listener.accept()
        except BaseException:
            client.close()
            raise
        return client, accepted


# -- errors of accept


def test_errno_classes_are_disjoint() -> None:
    """No errno of accept is of two classes, so each one has one answer."""
    assert sum(map(len, CLASSES)) == len(frozenset().union(*CLASSES))
    assert all(CLASSES)


def test_errno_classes_leave_out_what_cannot_pass() -> None:
    """A mistake in the listening socket surfaces; "try again" and "interrupted" are no errors."""
    classified = frozenset().union(*CLASSES)
    mistakes = {errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EFAULT}
    assert not classified & mistakes
    assert not classified & {errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR}


def test_what_descriptors_help_against() -> None:
    """The reserve descriptor is given up for EMFILE and ENFILE and for nothing else."""
    assert {errno.EMFILE, errno.ENFILE} == ACCEPT_DESCRIPTOR_ERRNOS
    assert {errno.ENOBUFS, errno.ENOMEM} == ACCEPT_MEMORY_ERRNOS


@linux
def test_what_the_manual_asks_to_retry() -> None:
    """The network errors that Linux's accept(2) says to treat like EAGAIN are the peer's."""
    assert {
        errno.ENETDOWN,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
    } | {errno.ECONNABORTED, errno.EPERM} <= ACCEPT_PEER_ERRNOS


def test_broken() -> None:
    """An error of the socket becomes trio's word for it, with its text and itself as the cause."""
    error = OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    wrapped = broken(error)
    assert type(wrapped) is trio.BrokenResourceError
    assert wrapped.__cause__ is error
    assert os.strerror(errno.ECONNRESET) in str(wrapped)


# -- errors of connect


# What connect(2), socket(2), bind(2) can say that time, or somebody else, may cure.
CURABLE = [
    "ECONNREFUSED",  # nobody listens yet
    "ENETUNREACH",  # the route may come back
    "EHOSTUNREACH",
    "EHOSTDOWN",
    "ENETDOWN",
    "ETIMEDOUT",
    "ECONNRESET",
    "ECONNABORTED",
    "EADDRINUSE",  # a port may come free
    "EADDRNOTAVAIL",  # an address may be given to this machine, a port may come free
    "EAGAIN",  # the Unix socket's queue is full
    "EMFILE",  # a descriptor may come free
    "ENFILE",
    "ENOBUFS",
    "ENOMEM",
    "ENOENT",  # the Unix socket's server has not bound it yet
    "EINTR",
    "EIO",
]


@pytest.mark.parametrize("name", CURABLE)
def test_errors_that_can_pass(name: str) -> None:
    """What time or somebody else may cure is worth another attempt."""
    number = getattr(errno, name)
    assert number not in CONNECT_FINAL_ERRNOS
    assert can_pass(OSError(number, os.strerror(number)))


@pytest.mark.parametrize("number", sorted(CONNECT_FINAL_ERRNOS))
def test_errors_that_cannot_pass(number: int) -> None:
    """What the next attempt would meet again is worth none."""
    assert not can_pass(OSError(number, os.strerror(number)))


def test_the_final_errors() -> None:
    """They are those of a missing permission, a missing family, an address that cannot be."""
    names = {
        "EACCES",
        "EPERM",
        "EAFNOSUPPORT",
        "EPROTONOSUPPORT",
        "EPROTOTYPE",
        "EINVAL",
        "ENOTSOCK",
        "ENAMETOOLONG",
    }
    assert {errno.errorcode[number] for number in CONNECT_FINAL_ERRNOS} == names


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("EAI_AGAIN", True),
        ("EAI_FAIL", True),
        ("EAI_NONAME", True),
        ("EAI_NODATA", True),
        ("EAI_MEMORY", True),
        ("EAI_SYSTEM", True),
        ("EAI_FAMILY", False),
        ("EAI_SERVICE", False),
        ("EAI_SOCKTYPE", False),
        ("EAI_BADFLAGS", False),
    ],
)
def test_errors_of_the_resolver(name: str, passes: bool) -> None:
    """A name may become known and a server may answer; a question that is wrong stays so."""
    number = getattr(socket, name)
    assert can_pass(socket.gaierror(number, "text")) is passes
    assert (number in RESOLVE_FINAL_ERRNOS) is not passes


def test_resolver_numbers_are_no_errnos() -> None:
    """The two kinds of numbers are kept apart, also where they are the same."""
    for number in CONNECT_FINAL_ERRNOS - RESOLVE_FINAL_ERRNOS:
        assert can_pass(socket.gaierror(number, "text"))
    for number in RESOLVE_FINAL_ERRNOS - CONNECT_FINAL_ERRNOS:
        assert can_pass(OSError(number, "text"))


def test_errors_without_a_number() -> None:
    """An error of the system that does not say which can pass; what is none of the system cannot:
    a name that DNS has no spelling for stays so.
    """
    assert can_pass(OSError("text"))
    assert can_pass(TimeoutError(errno.ETIMEDOUT, "text"))
    assert not can_pass(UnicodeError("label too long"))
    assert not can_pass(ValueError("text"))


def test_groups_of_errors() -> None:
    """One address that may answer is enough; where none may, the host is given up."""
    passing, final = OSError(errno.ECONNREFUSED, "refused"), OSError(errno.EACCES, "denied")
    assert can_pass(ExceptionGroup("", [final, passing]))
    assert can_pass(ExceptionGroup("", [final, ExceptionGroup("", [final, passing])]))
    assert not can_pass(ExceptionGroup("", [final, final]))
    assert not can_pass(ExceptionGroup("", [ExceptionGroup("", [final])]))


@linux
def test_errors_of_real_connects(tmp_path: Path) -> None:
    """What the kernel says to a connect is of the class that its cause asks for."""

    def error_of(family: int, address: Any) -> OSError:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            number = sock.connect_ex(address)
        return OSError(number, os.strerror(number))

    with refusing() as nobody:
        assert can_pass(error_of(socket.AF_INET, nobody.getsockname()))
    # The server is not there yet, or has left its socket behind.
    path = tmp_path / "socket"
    assert can_pass(error_of(socket.AF_UNIX, str(path)))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(str(path))
        # Of another type, for ever.
        assert not can_pass(error_of(socket.AF_UNIX, str(path)))
    assert can_pass(error_of(socket.AF_UNIX, str(path)))
    if have_ipv6():
        # Link-local, and it does not say on which link.
        assert not can_pass(error_of(socket.AF_INET6, ("fe80::1", 9)))


# -- what waits in a socket


@pytest.mark.parametrize("family", FAMILIES)
def test_peek(family: int) -> None:
    """It sees what is unread, and leaves it; nothing is None, the end is empty."""
    left, right = linked(SocketOptions(), family)
    with left, right:
        right.setblocking(False)
        assert peek(right) is None
        left.sendall(b"xyz")
        left.shutdown(socket.SHUT_WR)
        assert select.select([right], [], [], 10)[0]
        assert peek(right) == peek(right) == b"x"
        assert right.recv(100) == b"xyz"
        # The end comes at once after the data or a little later.
        assert select.select([right], [], [], 10)[0]
        assert peek(right) == peek(right) == b""


def test_peek_at_a_reset() -> None:
    """A broken connection raises, and has told of it by that."""
    left, right = linked(SocketOptions(), socket.AF_INET)
    with right:
        right.setblocking(False)
        reset(left)
        assert select.select([right], [], [], 10)[0]
        with pytest.raises(ConnectionResetError):
            peek(right)
        assert pending_error(right) is None


def test_pending_error() -> None:
    """The kernel's note is taken: it is there once."""
    left, right = linked(SocketOptions(), socket.AF_INET)
    with right:
        assert pending_error(right) is None
        reset(left)
        assert select.select([right], [], [], 10)[0]
        error = pending_error(right)
        assert isinstance(error, ConnectionResetError)
        assert error.errno == errno.ECONNRESET
        assert str(error) == f"[Errno {errno.ECONNRESET}] {os.strerror(errno.ECONNRESET)}"
        assert pending_error(right) is None


def test_pending_error_of_a_connect() -> None:
    """So a connect that was begun and refused tells why."""
    with refusing() as nobody, socket.socket() as sock:
        sock.setblocking(False)
        assert sock.connect_ex(nobody.getsockname()) in (errno.EINPROGRESS, errno.ECONNREFUSED)
        assert select.select([], [sock], [], 10)[1]
        assert isinstance(pending_error(sock), ConnectionRefusedError)


# -- options


@pytest.mark.parametrize("no_delay", [True, False])
def test_no_delay(no_delay: bool, tcp_socket: socket.socket) -> None:
    """TCP_NODELAY is as asked for."""
    apply_to_connection(tcp_socket, SocketOptions(no_delay=no_delay))
    assert bool(tcp_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) is no_delay


@pytest.mark.parametrize("keepalive", [True, False, Keepalive()])
def test_keepalive(keepalive: bool | Keepalive, tcp_socket: socket.socket) -> None:
    """SO_KEEPALIVE is on for True and for one's own timing, and off for False."""
    apply_to_connection(tcp_socket, SocketOptions(keepalive=keepalive))
    on = bool(tcp_socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
    assert on is (keepalive is not False)


@linux
def test_keepalive_timing(tcp_socket: socket.socket) -> None:
    """One's own timing is set, and True leaves the system's."""
    names = [socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT]
    system = [tcp_socket.getsockopt(socket.IPPROTO_TCP, name) for name in names]
    apply_to_connection(tcp_socket, SocketOptions(keepalive=True))
    assert [tcp_socket.getsockopt(socket.IPPROTO_TCP, name) for name in names] == system
    apply_to_connection(tcp_socket, EVERYTHING)
    assert [tcp_socket.getsockopt(socket.IPPROTO_TCP, name) for name in names] == [33, 7, 4]


@linux
@pytest.mark.parametrize(
    ("seconds", "milliseconds"), [(30, 30000), (12.3456, 12346), (0.001, 1), (1e-6, 1)]
)
def test_user_timeout(seconds: float, milliseconds: int, tcp_socket: socket.socket) -> None:
    """TCP_USER_TIMEOUT is in milliseconds, never less than asked, and never 0, which means none."""
    apply_to_connection(tcp_socket, SocketOptions(user_timeout=seconds))
    assert tcp_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == milliseconds


@linux
def test_buffer_sizes(tcp_socket: socket.socket) -> None:
    """The kernel's buffers have the sizes asked for (it counts its own overhead, so twice that)."""
    untouched = tcp_socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    apply_to_connection(tcp_socket, SocketOptions())
    assert tcp_socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == untouched
    apply_to_connection(tcp_socket, EVERYTHING)
    assert tcp_socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 32768
    assert tcp_socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * 16384


def test_options_of_a_unix_socket() -> None:
    """A Unix socket takes its buffer sizes, and TCP's own options are left out without an error."""
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        assert not is_tcp(left)
        apply_to_connection(left, EVERYTHING)
        assert left.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 32768
    with socket.socket(socket.AF_UNIX) as listener:
        apply_before_bind(listener, EVERYTHING)
        assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


def test_before_bind(tcp_socket: socket.socket) -> None:
    """A listening socket may take its port over from closed connections, and is of one family."""
    assert is_tcp(tcp_socket)
    apply_before_bind(tcp_socket, SocketOptions())
    assert tcp_socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    assert not tcp_socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
    if tcp_socket.family == socket.AF_INET6:
        assert tcp_socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


def test_reuse_port() -> None:
    """With reuse_port two sockets listen on one port, without it the second is refused."""
    for reuse_port in (True, False):
        options = SocketOptions(reuse_port=reuse_port)
        with socket.socket() as first, socket.socket() as second:
            apply_before_bind(first, options)
            first.bind(("127.0.0.1", 0))
            first.listen()
            apply_before_bind(second, options)
            if reuse_port:
                second.bind(first.getsockname())
                second.listen()
            else:
                with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
                    second.bind(first.getsockname())


def test_reuse_port_where_there_is_none(
    tcp_socket: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a platform without the option asking for it is an error, not a surprise later on."""
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    apply_before_bind(tcp_socket, SocketOptions())
    with pytest.raises(ValueError, match="reuse_port=True"):
        apply_before_bind(tcp_socket, SocketOptions(reuse_port=True))


def test_options_where_there_are_none(
    tcp_socket: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options that a platform lacks are left out."""
    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT"):
        monkeypatch.delattr(socket, name, raising=False)
    apply_to_connection(tcp_socket, EVERYTHING)
    assert tcp_socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@linux
@pytest.mark.parametrize("family", FAMILIES)
def test_accepted_sockets_inherit(family: int) -> None:
    """Linux gives accepted sockets what was set on the listening one, so nobody sets it again."""
    assert ACCEPTED_SOCKETS_INHERIT
    client, accepted = linked(EVERYTHING, family)
    with client, accepted:
        for level, name, value in (
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 33),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 7),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 12346),
            (socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * 32768),
            (socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * 16384),
        ):
            assert accepted.getsockopt(level, name) == value
    client, accepted = linked(SocketOptions(no_delay=False, keepalive=False), family)
    with client, accepted:
        assert not accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@linux
async def test_options_reach_the_connection() -> None:
    """What is asked of `open_tcp_acceptors` holds for the streams that are accepted."""
    (acceptor,) = await open_tcp_acceptors(0, host="127.0.0.1", socket_options=EVERYTHING)
    async with acceptor:
        with socket.create_connection(acceptor.address):
            async with await acceptor.accept() as stream:
                assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 33
                assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 32768


# -- closing


async def test_a_twin_is_the_same_socket() -> None:
    """The twin answers for the same descriptor, and detaching it leaves the socket open."""
    left, right = trio.socket.socketpair()
    with left, right:
        before = open_descriptors()
        twin = stdlib_twin(left)
        assert open_descriptors() == before
        assert twin.fileno() == left.fileno()
        assert (twin.family, twin.type, twin.proto) == (left.family, left.type, left.proto)
        # trio has made it non-blocking.
        with pytest.raises(BlockingIOError):
            twin.recv(1)
        twin.detach()
        await left.send(b"still open")
        assert await right.recv(100) == b"still open"


def test_reset_on_close() -> None:
    """After it, closing sends a reset: the peer sees no clean end."""
    client, accepted = linked(SocketOptions(), socket.AF_INET)
    with client, accepted:
        reset_on_close(accepted)
        accepted.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_reset_on_close_of_a_closed_socket() -> None:
    """Where the connection is gone already there is nothing to reset, and no error."""
    with socket.socket() as sock:
        sock.close()
        reset_on_close(sock)


# -- TCP_INFO


@linux
async def test_tcp_info() -> None:
    """What the kernel knows of a live connection is read from the right places."""
    left, right = await tcp_pair()
    async with left, right:
        for _ in range(5):
            await left.send_all(b"ping")
            await right.receive_some()
            await right.send_all(b"pong")
            await left.receive_some()
        info = left.tcp_info()
        assert isinstance(info, TcpInfo)
        established = 1
        assert info.state == established
        # Each of these can be had in another way, or is known.
        mss = left.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        assert info.send_mss == mss
        # Nothing made it shrink, and Linux begins with ten (RFC 6928).
        assert 10 <= info.congestion_window <= 1000
        assert 0 < info.rtt < 10
        assert 0 < info.rtt_variance < 10
        assert info.retransmits == info.probes == 0
        assert info.lost == info.total_retransmits == 0
        assert info.unacknowledged <= 1


@linux
async def test_tcp_info_follows_the_connection() -> None:
    """The state is the kernel's, step by step to the end."""
    left, right = await tcp_pair()
    fin_wait_2, close_wait = 5, 8

    def states() -> list[int]:
        return [info.state for conn in (left, right) if (info := conn.tcp_info())]

    async with left, right:
        await left.send_eof()
        assert await right.receive_some() == b""
        # The kernel may take its time to acknowledge.
        await until(lambda: states() == [fin_wait_2, close_wait])


@linux
async def test_tcp_info_of_a_silent_window() -> None:
    """A peer that takes nothing shows: probes of its closed window are counted."""
    left, right = linked(SocketOptions(receive_buffer=4096), socket.AF_INET)
    with left, right:
        left.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                left.send(bytes(65536))
        await until(lambda: (info := read_tcp_info(left)) and info.probes)


async def test_no_tcp_info(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none for a Unix socket, for a closed connection, or on another platform."""
    left, right = await unix_pair()
    async with left, right:
        assert left.tcp_info() is None
    left, right = await tcp_pair()
    async with left, right:
        monkeypatch.delattr(socket, "TCP_INFO", raising=False)
        assert left.tcp_info() is None
        monkeypatch.undo()
        left.force_close()
        assert left.tcp_info() is None
