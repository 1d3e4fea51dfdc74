"""ProxyHeader: what a proxy says of a connection's client, and how that is written."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trioreactor.address import SocketAddress
from trioreactor.proxy_tlvs import (
    CRC32C_SIZE,
    ProxySsl,
    ProxyTlvType,
    Tlvs,
    checked_tlvs,
    crc32c,
    find_tlv,
    join_tlvs,
    text_of,
)

SIGNATURE_1 = b"PROXY "
SIGNATURE_2 = b"\r\n\r\n\0\r\nQUIT\n"

# The signature; version and command; family and transport; the length of what follows.
FIXED = struct.Struct("!12sBBH")
# The addresses of each family: both hosts, then both ports.
INET = struct.Struct("!4s4sHH")
INET6 = struct.Struct("!16s16sHH")
UNIX = struct.Struct("!108s108s")
UNIX_PATH_MAX = 108

COMMANDS = {"LOCAL": 0x20, "PROXY": 0x21}
TRANSPORTS = {"stream": 1, "dgram": 2}

# What `FIXED` says the length of, at most.
LENGTH_MAX = 0xFFFF


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """Whose connection it is: the client's address, and the address that the client connected to.

    Received, it is `TcpConnection.proxy_header`. To be sent, it is an option of `TcpClient`, or
    ``conn.send(header.encode())``.
    """

    source: SocketAddress | None = None
    """The client's address, as of sockets: ``(host, port)``, for IPv6 with two zeros more, or a
    Unix socket's path. None: the proxy says of nobody, or does not know."""
    destination: SocketAddress | None = None
    """The address at the proxy that the client connected to; None with `source`."""
    version: Literal[1, 2] = 2
    """1 is a line of text, 2 binary."""
    command: Literal["PROXY", "LOCAL"] = "PROXY"
    """LOCAL: the proxy speaks for itself, for example to check our health. Only in version 2."""
    transport: Literal["stream", "dgram"] = "stream"
    """How the client speaks to the proxy: TCP, or UDP."""
    tlvs: Tlvs = ()
    """What else it says: types and values in their order, but for paddings and the checksum. Use
    the properties for registered types, and `tlv` for others. Only in version 2."""
    checksum: bool = False
    """Whether it has a checksum: received, one that was right. Only in version 2."""

    def __post_init__(self) -> None:
        if self.version not in (1, 2):
            raise ValueError(f"ProxyHeader(version={self.version!r}): pass 1 or 2")
        if self.command not in COMMANDS:
            raise ValueError(f'ProxyHeader(command={self.command!r}): pass "PROXY" or "LOCAL"')
        if self.transport not in TRANSPORTS:
            raise ValueError(f'ProxyHeader(transport={self.transport!r}): pass "stream" or "dgram"')
        if (self.source is None) != (self.destination is None):
            raise ValueError("ProxyHeader: pass both source and destination, or neither")
        if self.source is not None and self.destination is not None:
            if self.command == "LOCAL":
                raise ValueError("ProxyHeader: a LOCAL one has no addresses")
            source, destination = _matched(_plain(self.source), _plain(self.destination))
            object.__setattr__(self, "source", source)
            object.__setattr__(self, "destination", destination)
        tlvs = checked_tlvs("ProxyHeader", self.tlvs)
        object.__setattr__(
            self,
            "tlvs",
            tuple(t for t in tlvs if t[0] not in (ProxyTlvType.NOOP, ProxyTlvType.CRC32C)),
        )
        if self.version == 1 and (self.tlvs or self.checksum or self.command == "LOCAL"):
            raise ValueError("ProxyHeader: version 1 has no TLVs, no checksum and no LOCAL")
        if (ssl := find_tlv(self.tlvs, ProxyTlvType.SSL)) is not None:
            ProxySsl.decode(ssl)

    def tlv(self, kind: int) -> bytes | None:
        """The first value of that type, or None."""
        return find_tlv(self.tlvs, kind)

    @property
    def alpn(self) -> bytes | None:
        """The protocol that the client and the proxy have agreed on by TLS."""
        return self.tlv(ProxyTlvType.ALPN)

    @property
    def authority(self) -> str | None:
        """The host name that the client asked for: TLS's server name."""
        return text_of(self.tlvs, ProxyTlvType.AUTHORITY)

    @property
    def unique_id(self) -> bytes | None:
        """What the proxies call this connection in their logs."""
        return self.tlv(ProxyTlvType.UNIQUE_ID)

    @property
    def ssl(self) -> ProxySsl | None:
        """What the proxy tells of the client's TLS."""
        value = self.tlv(ProxyTlvType.SSL)
        return None if value is None else ProxySsl.decode(value)

    @property
    def network_namespace(self) -> str | None:
        """The name of the network namespace that the client came by."""
        return text_of(self.tlvs, ProxyTlvType.NETNS)

    def encode(self) -> bytes:
        """The header as it is sent: before everything else, and at once.

        Raises `ValueError` if the TLVs are too long for the length's field.
        """
        return self._encode_1() if self.version == 1 else self._encode_2()

    def _encode_1(self) -> bytes:
        source, destination = self.source, self.destination
        if not isinstance(source, tuple) or not isinstance(destination, tuple):
            return b"PROXY UNKNOWN\r\n"
        if self.transport != "stream":
            return b"PROXY UNKNOWN\r\n"
        family = "TCP6" if ":" in source[0] else "TCP4"
        line = f"PROXY {family} {source[0]} {destination[0]} {source[1]} {destination[1]}\r\n"
        return line.encode("ascii")

    def _encode_2(self) -> bytes:
        source, destination = self.source, self.destination
        transport = TRANSPORTS[self.transport]
        if source is None or destination is None:
            family, block = 0, b""
        elif isinstance(source, tuple) and isinstance(destination, tuple):
            family, packing = (0x20, INET6) if ":" in source[0] else (0x10, INET)
            hosts = (ipaddress.ip_address(end[0]).packed for end in (source, destination))
            block = packing.pack(*hosts, source[1], destination[1])
            family |= transport
        else:
            family = 0x30 | transport
            block = UNIX.pack(_path_bytes(source), _path_bytes(destination))
        block += join_tlvs(self.tlvs)
        if self.checksum:
            block += join_tlvs(((ProxyTlvType.CRC32C, bytes(CRC32C_SIZE)),))
        if len(block) > LENGTH_MAX:
            raise ValueError(f"ProxyHeader: {len(block)} bytes: the most is {LENGTH_MAX}")
        data = FIXED.pack(SIGNATURE_2, COMMANDS[self.command], family, len(block)) + block
        if self.checksum:
            data = data[:-CRC32C_SIZE] + crc32c(data).to_bytes(CRC32C_SIZE, "big")
        return data


def encode_proxy_header(
    version: Literal[1, 2],
    source: SocketAddress | None,
    destination: SocketAddress | None,
    *,
    command: Literal["PROXY", "LOCAL"] = "PROXY",
    tlvs: Mapping[int, bytes] | Tlvs = (),
    checksum: bool = False,
) -> bytes:
    """A PROXY protocol header, for a proxy to send before everything else: ``conn.send(...)``.

    *source* is the client's address, *destination* the one that it connected to; None for both if
    they are unknown. Where one is IPv4 and the other IPv6, both are sent as IPv6. Raises
    `ValueError` for what cannot be said in that version.
    """
    return ProxyHeader(
        source,
        destination,
        version=version,
        command=command,
        tlvs=tlvs if isinstance(tlvs, tuple) else tuple(tlvs.items()),
        checksum=checksum,
    ).encode()


def _ipv6_text(ip: ipaddress.IPv6Address) -> str:
    """As the kernel writes it: Python before 3.13 has hexadecimal digits where IPv4 is inside."""
    return str(ip) if ip.ipv4_mapped is None else f"::ffff:{ip.ipv4_mapped}"


def _plain(address: SocketAddress) -> SocketAddress:
    """*address* in the one way in which it can be sent."""
    if isinstance(address, (str, bytes)):
        path = _path_bytes(address)
        if len(path) > UNIX_PATH_MAX:
            raise ValueError(f"ProxyHeader: {address!r} is longer than a Unix socket's path")
        return unix_path(path)
    host, port = address[:2]
    if type(port) is not int or not 0 <= port <= 65535:
        raise ValueError(f"ProxyHeader: the port is {port!r}: pass 0 to 65535")
    # A scope ("fe80::1%eth0") means nothing on another machine.
    if ":" in host:
        return _ipv6_text(ipaddress.IPv6Address(host.partition("%")[0])), port, 0, 0
    return str(ipaddress.IPv4Address(host)), port


def _matched(
    source: SocketAddress, destination: SocketAddress
) -> tuple[SocketAddress, SocketAddress]:
    """Both of one family, for a header has one: IPv4 is written inside IPv6 if need be."""
    if isinstance(source, tuple) != isinstance(destination, tuple):
        raise ValueError("ProxyHeader: one address is an IP address, the other a Unix socket's")
    if len(source) != len(destination):
        return _as_ipv6(source), _as_ipv6(destination)
    return source, destination


def _as_ipv6(address: SocketAddress) -> SocketAddress:
    if isinstance(address, tuple) and len(address) == 2:
        return f"::ffff:{address[0]}", address[1], 0, 0
    return address


def unix_path(path: bytes) -> SocketAddress:
    """A path as Python's sockets give it: text; or bytes where it is no path but a name."""
    if path.startswith(b"\0"):
        return path.rstrip(b"\0") or ""
    return path.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _path_bytes(path: object) -> bytes:
    """A Unix socket's path as the kernel has it."""
    if isinstance(path, bytes):
        return path
    assert isinstance(path, str)
    return path.encode("utf-8", "surrogateescape")
