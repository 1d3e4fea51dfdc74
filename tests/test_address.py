"""Addresses: how they are printed, and which of them count as one peer."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trioreactor import SocketAddress, format_address
from trioreactor.address import peer_key

pytestmark = pytest.mark.pure

pure = settings(deadline=None, derandomize=True, max_examples=200)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("127.0.0.1", 80), "127.0.0.1:80"),
        (("::1", 80, 0, 0), "[::1]:80"),
        (("fe80::1%eth0", 80, 0, 2), "[fe80::1%eth0]:80"),
        (("::ffff:192.0.2.1", 80, 0, 0), "[::ffff:192.0.2.1]:80"),
        ("/run/server.sock", "/run/server.sock"),
        (b"/run/server.sock", "/run/server.sock"),
        ("", "unix"),
        (b"", "unix"),
        (b"\0abstract", "@abstract"),
        ("\0abstract", "@abstract"),
    ],
)
def test_format_address(address: SocketAddress, text: str) -> None:
    """Every kind of address has one short text, and only IPv6 has brackets."""
    assert format_address(address) == text


def test_format_address_of_undecodable_bytes() -> None:
    """A Unix name that is no UTF-8 is still printable, and its bytes can be had back."""
    text = format_address(b"\0\xff\xfe")
    assert text.startswith("@")
    assert text.encode("utf-8", "surrogateescape") == b"@\xff\xfe"


def test_format_address_of_real_sockets(tmp_path: Path) -> None:
    """What the kernel answers for each kind of socket can be printed."""
    with socket.socket(socket.AF_INET) as sock:
        sock.bind(("127.0.0.1", 0))
        assert format_address(sock.getsockname()) == f"127.0.0.1:{sock.getsockname()[1]}"
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        assert format_address(left.getpeername()) == "unix"
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        assert format_address(sock.getsockname()) == path


@pytest.mark.parametrize("address", ["", "/run/server.sock", b"", b"\0abstract"])
def test_unix_peers_are_not_counted(address: SocketAddress) -> None:
    """A Unix socket's peers have no address to tell them apart by, so they have no key."""
    assert peer_key(address) is None


def test_mapped_ipv4_is_the_same_peer() -> None:
    """One IPv4 address is one peer on whichever family's socket it arrives, in every spelling."""
    plain = peer_key(("192.0.2.1", 1000))
    assert plain is not None
    assert peer_key(("::ffff:192.0.2.1", 1000, 0, 0)) == plain
    assert peer_key(("::ffff:c000:201", 2000, 0, 0)) == plain
    assert peer_key(("::ffff:192.0.2.2", 1000, 0, 0)) != plain


def test_scope_does_not_make_another_peer() -> None:
    """The interface that a link-local peer was heard on is no part of its key."""
    assert peer_key(("fe80::1%eth0", 1, 0, 2)) == peer_key(("fe80::1", 2, 0, 3))


@given(number=st.integers(0, 2**32 - 1), bit=st.integers(0, 31), port=st.integers(1, 65535))
@pure
def test_ipv4_counts_by_address(number: int, bit: int, port: int) -> None:
    """Two IPv4 peers are two if their addresses differ in any bit; the port says nothing."""
    key = peer_key((str(ipaddress.IPv4Address(number)), port))
    assert key == peer_key((str(ipaddress.IPv4Address(number)), 1))
    assert key != peer_key((str(ipaddress.IPv4Address(number ^ 1 << bit)), port))


# Above the ranges in which IPv4 is embedded.
@given(number=st.integers(0x2000 << 112, 2**128 - 1), bit=st.integers(0, 124))
@pure
def test_ipv6_counts_by_network(number: int, bit: int) -> None:
    """Two IPv6 peers are two if they differ in the first 64 bits, and one if only in the rest."""
    key = peer_key((str(ipaddress.IPv6Address(number)), 1, 0, 0))
    other = peer_key((str(ipaddress.IPv6Address(number ^ 1 << bit)), 2, 0, 0))
    assert (key == other) == (bit < 64)
