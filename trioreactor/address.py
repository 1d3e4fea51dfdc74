"""Socket addresses: how they are printed, and which of them count as one peer."""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import TypeAlias

SocketAddress: TypeAlias = tuple[str, int] | tuple[str, int, int, int] | str | bytes
"""What the socket module uses for TCP over IPv4 and over IPv6, and for Unix sockets."""

# struct sockaddr_un has 108 bytes, one of them for the final zero.
LONGEST_UNIX_PATH = 107

# RFC 4291: one subscriber is commonly given a whole /64, so counting single IPv6 addresses
# would not limit anybody.
_IPV6_PEER_PREFIX = 64


def format_address(address: SocketAddress) -> str:
    """Text for logs and names: ``127.0.0.1:80``, ``[::1]:80``, or a Unix socket's path.

    An abstract Unix name is written with a leading ``@``, and an unnamed one as ``unix``.
    """
    if isinstance(address, bytes):
        address = address.decode("utf-8", "surrogateescape")
    if isinstance(address, str):
        return address.replace("\0", "@") or "unix"
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def peer_key(address: SocketAddress) -> str | None:
    """What `Limits.per_peer` counts by, or None for a Unix socket, whose peers have no address.

    IPv4 counts by address, also when it is written inside IPv6 (``::ffff:192.0.2.1``); IPv6
    counts by its /64 network.
    """
    if isinstance(address, (str, bytes)):
        return None
    host = address[0]
    if ":" not in host:
        # The kernel writes IPv4 in one way only, so it needs no parsing.
        return host
    return _network(host)


# Connections of one network come again and again, and parsing costs as much as serving them.
@lru_cache(1024)
def _network(host: str) -> str:
    # A scope ("fe80::1%eth0") tells links apart, not peers on one link.
    ip = ipaddress.IPv6Address(host.partition("%")[0])
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.IPv6Network((ip, _IPV6_PEER_PREFIX), strict=False))
