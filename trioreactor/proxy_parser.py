"""ProxyParser: takes a PROXY protocol header in pieces, and never a byte of what follows it."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal, TypeAlias

from trioreactor.address import SocketAddress
from trioreactor.errors import ProxyProtocolError
from trioreactor.proxy_header import (
    COMMANDS,
    FIXED,
    INET,
    INET6,
    SIGNATURE_1,
    SIGNATURE_2,
    TRANSPORTS,
    UNIX,
    ProxyHeader,
    unix_path,
)
from trioreactor.proxy_tlvs import CRC32C_SIZE, ProxyTlvType, Tlvs, crc32c, find_tlv, split_tlvs

Version: TypeAlias = Literal[1, 2]

# The protocol's own bound for a line of version 1, with its CRLF.
LINE_MAX = 107

_SIGNATURES: dict[Version, bytes] = {1: SIGNATURE_1, 2: SIGNATURE_2}

# The fewest bytes that a header can have.
_LEAST: dict[Version, int] = {1: len(b"PROXY UNKNOWN\r\n"), 2: FIXED.size}

# The fewest bytes of each word behind the protocol's: two addresses and two ports.
_LEAST_WORDS = {b"TCP4": (7, 7, 1, 1), b"TCP6": (2, 2, 1, 1)}

# Python's own int() takes a sign, spaces, underscores and other scripts' digits.
_PORT = re.compile(rb"0|[1-9][0-9]{0,4}")

_PROXY = COMMANDS["PROXY"]
_LOCAL = COMMANDS["LOCAL"]
_TRANSPORT_NAMES: dict[int, Literal["stream", "dgram"]] = {
    TRANSPORTS["stream"]: "stream",
    TRANSPORTS["dgram"]: "dgram",
}
_UNSPECIFIED = 0x00


class ProxyParser:
    """Parses one header of one of *versions*, of at most *max_header* bytes.

    Sans-I/O: read up to `needed` bytes and `feed` them, until it gives the header. `needed` is how
    many bytes there must be more of it at least, so what follows the header is not touched.
    """

    __slots__ = ("_data", "_max_header", "_version", "_versions", "needed")

    def __init__(self, versions: Collection[Version] = (1, 2), max_header: int = 536) -> None:
        self._versions = versions
        self._max_header = max_header
        self._data = bytearray()
        # Known once what has come fits only one.
        self._version: Version | None = None
        self.needed = min(_LEAST[version] for version in versions)

    @property
    def received(self) -> int:
        """How many bytes it has been fed."""
        return len(self._data)

    def feed(self, data: bytes) -> ProxyHeader | None:
        """Take *data*, at most `needed` bytes. The header, once it is complete.

        Raises `ProxyProtocolError` as soon as it is seen that no valid header can come of it.
        """
        if len(data) > self.needed:
            raise ValueError(f"feed: {len(data)} bytes: pass at most {self.needed}")
        self._data += data
        if self._version is None:
            self._version = self._find_version()
            if self._version is None:
                return None
        if self._version == 1:
            return self._parse_1(bytes(self._data))
        return self._parse_2(bytes(self._data))

    def _find_version(self) -> Version | None:
        data = bytes(self._data)
        if not data:
            return None
        for version in self._versions:
            signature = _SIGNATURES[version]
            if data[: len(signature)] == signature[: len(data)]:
                # They differ in their first byte.
                return version
        allowed = " or ".join(str(version) for version in sorted(self._versions))
        raise ProxyProtocolError(f"{data!r} begins no PROXY header of version {allowed}")

    def _check_signature(self, data: bytes, signature: bytes) -> None:
        if data[: len(signature)] != signature[: len(data)]:
            raise ProxyProtocolError(f"{data!r} begins no PROXY header")

    # -- version 1

    def _parse_1(self, data: bytes) -> ProxyHeader | None:
        self._check_signature(data, SIGNATURE_1)
        end = data.find(b"\r")
        if end < 0 or end == len(data) - 1:
            line = data if end < 0 else data[:-1]
            if b"\n" in line:
                raise _wrong_line(data)
            self.needed = 1 if end >= 0 else _least_left(line)
            if len(data) + self.needed > min(LINE_MAX, self._max_header):
                raise ProxyProtocolError(f"{data!r}: a PROXY line that is too long")
            return None
        if data[end:] != b"\r\n" or b"\n" in data[:end]:
            raise _wrong_line(data)
        self.needed = 0
        return _header_of_line(data[:end])

    # -- version 2

    def _parse_2(self, data: bytes) -> ProxyHeader | None:
        self._check_signature(data, SIGNATURE_2)
        if len(data) < FIXED.size:
            self.needed = FIXED.size - len(data)
            return None
        _, command, kind, length = FIXED.unpack_from(data)
        if len(data) == FIXED.size:
            if command not in (_LOCAL, _PROXY):
                raise ProxyProtocolError(
                    f"{command:#04x}: no version and command of a PROXY header"
                )
            if FIXED.size + length > self._max_header:
                raise ProxyProtocolError(
                    f"a PROXY header of {FIXED.size + length} bytes, where at most "
                    f"{self._max_header} are allowed"
                )
        self.needed = FIXED.size + length - len(data)
        if self.needed:
            return None
        if command == _LOCAL:
            # The protocol has the rest ignored, the family too.
            return ProxyHeader(command="LOCAL")
        try:
            return _header_of_block(data, kind)
        except ValueError as error:
            raise ProxyProtocolError(str(error)) from None


def _wrong_line(line: bytes) -> ProxyProtocolError:
    return ProxyProtocolError(f"{line!r} is no PROXY line")


def _least_left(line: bytes) -> int:
    """How many bytes must follow *line*, at least, if it is to become a valid one."""
    words = line.split(b" ")
    protocol = words[1] if len(words) > 1 else b""
    if len(words) < 3:
        # The protocol's own name may not be complete.
        known = (b"UNKNOWN", *_LEAST_WORDS)
        if not any(name.startswith(protocol) for name in known):
            raise _wrong_line(line)
        if protocol not in _LEAST_WORDS:
            return max(_LEAST[1] - len(line), 2)
    elif protocol == b"UNKNOWN":
        return 2
    elif protocol not in _LEAST_WORDS:
        raise _wrong_line(line)
    least = _LEAST_WORDS[protocol]
    begun = words[2:]
    if len(begun) > len(least):
        raise _wrong_line(line)
    left = len(b"\r\n")
    if begun:
        left += max(least[len(begun) - 1] - len(begun[-1]), 0)
    return left + sum(1 + size for size in least[len(begun) :])


def _header_of_line(line: bytes) -> ProxyHeader:
    """The header in *line*, which begins with the signature and has no CRLF."""
    words = line.split(b" ")
    if words[1] == b"UNKNOWN":
        return ProxyHeader(version=1)
    if words[1] not in _LEAST_WORDS or len(words) != 6:
        raise _wrong_line(line)
    try:
        return ProxyHeader(
            _address(words[1], words[2], words[4]),
            _address(words[1], words[3], words[5]),
            version=1,
        )
    except ValueError:
        raise _wrong_line(line) from None


def _address(protocol: bytes, host: bytes, port: bytes) -> SocketAddress:
    if not _PORT.fullmatch(port):
        raise ValueError(port)
    # That it is an address, the header sees to. Python takes a scope ("%eth0") for a part of one.
    if (b":" in host) != (protocol == b"TCP6") or b"%" in host:
        raise ValueError(host)
    return host.decode("ascii"), int(port)


def _header_of_block(data: bytes, kind: int) -> ProxyHeader:
    """The header in *data*, which is as long as it says and a PROXY one. `ValueError` for none."""
    at = FIXED.size
    source: SocketAddress | None = None
    destination: SocketAddress | None = None
    transport: Literal["stream", "dgram"] = "stream"
    if kind != _UNSPECIFIED:
        family, number = kind >> 4, kind & 0x0F
        packing = {1: INET, 2: INET6, 3: UNIX}.get(family)
        if packing is None or number not in _TRANSPORT_NAMES:
            raise ValueError(f"{kind:#04x}: no family and transport of a PROXY header")
        if len(data) < at + packing.size:
            raise ValueError(
                f"a PROXY header with {len(data) - at} bytes where addresses take {packing.size}"
            )
        fields = packing.unpack_from(data, at)
        at += packing.size
        transport = _TRANSPORT_NAMES[number]
        if family == 1:
            source = ".".join(map(str, fields[0])), fields[2]
            destination = ".".join(map(str, fields[1])), fields[3]
        elif family == 2:
            # The header writes them in the usual way.
            source = fields[0].hex(":", 2), fields[2]
            destination = fields[1].hex(":", 2), fields[3]
        else:
            source, destination = unix_path(fields[0]), unix_path(fields[1])
    tlvs = split_tlvs(data[at:])
    return ProxyHeader(
        source,
        destination,
        transport=transport,
        tlvs=tlvs,
        checksum=_check_checksum(data, at, tlvs),
    )


def _check_checksum(data: bytes, at: int, tlvs: Tlvs) -> bool:
    """Whether there is one. Raises `ValueError` if it is wrong. The TLVs begin at *at*."""
    value = find_tlv(tlvs, ProxyTlvType.CRC32C)
    if value is None:
        return False
    if len(value) != CRC32C_SIZE:
        raise ValueError(f"a PROXY header with a checksum of {len(value)} bytes")
    for kind, found in tlvs:
        at += 3
        if kind == ProxyTlvType.CRC32C:
            break
        at += len(found)
    zeroed = data[:at] + bytes(CRC32C_SIZE) + data[at + CRC32C_SIZE :]
    if crc32c(zeroed) != int.from_bytes(value, "big"):
        raise ValueError("a PROXY header whose checksum is wrong")
    return True
