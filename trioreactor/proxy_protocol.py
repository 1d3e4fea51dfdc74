"""ProxyProtocol: connections through a proxy that says in a header whose they are."""

from __future__ import annotations

import inspect
import ipaddress
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias, cast

import trio

from trioreactor.address import SocketAddress, format_address
from trioreactor.errors import ProxyProtocolError
from trioreactor.limits import ConnectionLimiter
from trioreactor.options import check_count, check_present
from trioreactor.proxy_header import FIXED, LENGTH_MAX, ProxyHeader
from trioreactor.proxy_parser import LINE_MAX, ProxyParser, Version
from trioreactor.state import CloseReason, ConnectionState
from trioreactor.tcp_connection import TcpConnection

logger = logging.getLogger("trioreactor.server")

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

HeaderToSend: TypeAlias = Version | ProxyHeader | Callable[[TcpConnection], ProxyHeader]
"""What a client sends first: its own addresses in that version; that header; or the one that the
function gives for a connection."""

_TRUSTED = 'pass networks, such as ["10.0.0.0/8"], or "any"'

# Where IPv4 addresses are written inside IPv6: ::ffff:0:0/96.
_MAPPED_PREFIX = 96


@dataclass(frozen=True, kw_only=True, slots=True)
class ProxyProtocol:
    """Of whom a PROXY protocol header is believed, and which.

    Every connection must then begin with one. Nobody is served without: who is not trusted, sends
    something else, or takes too long, is closed.
    """

    trusted: str | Network | Iterable[str | Network]
    """The networks that the proxies are in, such as ``["10.0.0.0/8", "fd00::/8"]``. "any": whoever
    can connect may say who they are, so let only proxies connect. (no default: to believe everybody
    lets everybody forge their address)"""
    unix: bool = False
    """Whether to believe who connects by a Unix socket: whoever its file's mode lets in. Included
    in "any"."""
    versions: Collection[Version] = (1, 2)
    """Which are accepted: 1 (text), 2 (binary). (both: they cannot be mistaken for each other)"""
    max_header: int = 536
    """The most bytes that a header may have: a longer one is refused before it is read. (the least
    that every TCP carries in one segment; a client's certificate in it needs more)"""
    networks: tuple[Network, ...] | None = field(init=False, repr=False, compare=False)
    """`trusted` as networks; None for "any"."""

    def __post_init__(self) -> None:
        networks = _networks(self.trusted)
        object.__setattr__(self, "networks", networks)
        object.__setattr__(self, "trusted", "any" if networks is None else networks)
        if not isinstance(self.unix, bool):
            raise TypeError(f"ProxyProtocol(unix={self.unix!r}): pass a bool")
        if self.networks == () and not self.unix:
            raise ValueError(f"ProxyProtocol(trusted={self.trusted!r}): {_TRUSTED}; or unix=True")
        versions: object = self.versions
        if not isinstance(versions, Collection) or not set(versions) or set(versions) - {1, 2}:
            raise ValueError(f"ProxyProtocol(versions={versions!r}): pass (1,), (2,) or (1, 2)")
        object.__setattr__(self, "versions", tuple(sorted(set(self.versions))))
        check_present("ProxyProtocol", max_header=self.max_header)
        most = FIXED.size + LENGTH_MAX
        check_count(
            "ProxyProtocol", "max_header", self.max_header, least=LINE_MAX, most=most, unit="bytes"
        )

    def trusts(self, address: SocketAddress) -> bool:
        """Whether who connects from *address* is believed."""
        if self.networks is None:
            return True
        if isinstance(address, (str, bytes)):
            return self.unix
        ip = ipaddress.ip_address(address[0].partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        return any(ip in network for network in self.networks)


def _networks(trusted: object) -> tuple[Network, ...] | None:
    if trusted == "any":
        return None
    one = (str, ipaddress.IPv4Network, ipaddress.IPv6Network)
    if isinstance(trusted, one):
        return (_network(trusted),)
    if not isinstance(trusted, Iterable):
        raise TypeError(f"ProxyProtocol(trusted={trusted!r}): {_TRUSTED}")
    return tuple(_network(each) for each in cast("Iterable[object]", trusted))


def _network(given: object) -> Network:
    # ip_network takes numbers, too.
    if not isinstance(given, (str, ipaddress.IPv4Network, ipaddress.IPv6Network)):
        raise TypeError(f"ProxyProtocol: {given!r} is no network: {_TRUSTED}")
    try:
        network = ipaddress.ip_network(given)
    except ValueError as error:
        raise ValueError(f"ProxyProtocol: {error}: {_TRUSTED}") from None
    first = network.network_address
    if isinstance(first, ipaddress.IPv6Address) and network.prefixlen >= _MAPPED_PREFIX:
        mapped = first.ipv4_mapped
        if mapped is not None:
            # As the addresses that it is compared with.
            return ipaddress.ip_network((mapped, network.prefixlen - _MAPPED_PREFIX))
    return network


# -- receiving


async def receive_proxy_header(conn: TcpConnection, options: ProxyProtocol) -> ProxyHeader:
    """Read the PROXY header that a new connection begins with, and nothing of what follows it.

    From then on ``conn.peer_address`` is the client's, ``conn.proxy_address`` the proxy's, and
    ``conn.proxy_header`` is the header. Where that tells no client (LOCAL, or unknown), the peer
    stays who it was.

    Raises `ProxyProtocolError` if the peer is not trusted, or sends no valid header; what `conn`
    raises if it breaks. Then, and when cancelled, only closing is left. It has no deadline of its
    own: in a server it is under `Timeouts.handshake`, elsewhere use `trio.fail_after`.
    """
    header = await _read_header(conn, options)
    conn.set_proxy_header(header)
    return header


async def _read_header(conn: TcpConnection, options: ProxyProtocol) -> ProxyHeader:
    if not options.trusts(conn.peer_address):
        await trio.lowlevel.checkpoint()
        who = format_address(conn.peer_address)
        raise ProxyProtocolError(f"{who} is not trusted to send PROXY headers")
    parser = ProxyParser(options.versions, options.max_header)
    while True:
        data = await conn.receive_some(parser.needed)
        if not data:
            raise ProxyProtocolError(
                f"the peer closed after {parser.received} bytes of a PROXY header"
            )
        if (header := parser.feed(data)) is not None:
            return header


class ProxyOpening:
    """An opening by a PROXY header. Limits for each peer hold for its client, once that is known,
    and not for the proxy.
    """

    def __init__(self, options: ProxyProtocol, limiter: ConnectionLimiter) -> None:
        if not isinstance(options, ProxyProtocol):
            raise TypeError(f"proxy_protocol={options!r}: pass ProxyProtocol(trusted=[...])")
        self._options = options
        self._limiter = limiter

    async def __call__(self, conn: TcpConnection) -> None:
        """Read it. Closes *conn* if there are too many of its client."""
        header = await _read_header(conn, self._options)
        if not self._limiter.try_enter(header.source or NOBODY):
            self._limiter.reject("per_peer")
            logger.debug("%s: too many of %r", conn.name, header.source)
            conn.force_close(CloseReason.HANDSHAKE_FAILED)
            return
        # `counted_address` goes by this: it is counted if and only if it has a header.
        conn.set_proxy_header(header)
        logger.debug("%s: for %s", conn.name, format_address(conn.peer_address))


NOBODY = ""
"""An address that no limit counts."""


def counted_address(conn: TcpConnection, *, behind_proxy: bool) -> SocketAddress:
    """Whom a server has counted *conn* as. One *behind_proxy* is its client's: nobody's until its
    header has come, or if that names none, as those of a proxy's health checks.
    """
    header = conn.proxy_header
    if behind_proxy:
        return NOBODY if header is None or header.source is None else header.source
    # A handler may have read a header by itself.
    address = conn.proxy_address
    return conn.peer_address if address is None else address


# -- sending


def checked_header_to_send(owner: str, what: HeaderToSend | None) -> HeaderToSend | None:
    """*what*. Raises `TypeError` unless it is one, or None."""
    known = what is None or isinstance(what, ProxyHeader) or (type(what) is int and what in (1, 2))
    if not known and (not callable(what) or inspect.iscoroutinefunction(what)):
        raise TypeError(
            f"{owner}(proxy_protocol={what!r}): pass 1 or 2 for one's own addresses, a "
            "ProxyHeader, or a plain function from a connection to one"
        )
    return what


def introduce(conn: TcpConnection, what: HeaderToSend | None) -> None:
    """Send a header on *conn*, which has just been made and sent nothing, if there is one to send.

    What a user's function raises closes *conn* and is raised; a peer that has gone is met later.
    """
    # One that was gone before it could be asked its address: there is nothing to say, and nobody.
    gone = not conn.peer_address and isinstance(conn.local_address, tuple)
    if what is None or gone:
        return
    try:
        data = _header_for(conn, what).encode()
    except BaseException:
        conn.force_close()
        raise
    try:
        if conn.state is ConnectionState.CONNECTING:
            conn.send_opening(data)
        else:
            conn.send(data)
    except trio.BrokenResourceError:
        pass


def _header_for(conn: TcpConnection, what: HeaderToSend) -> ProxyHeader:
    if isinstance(what, ProxyHeader):
        return what
    if not callable(what):
        return ProxyHeader(conn.local_address, conn.peer_address, version=what)
    header: object = what(conn)
    if not isinstance(header, ProxyHeader):
        raise TypeError(f"proxy_protocol={what!r} gave {header!r}, which is no ProxyHeader")
    return header
