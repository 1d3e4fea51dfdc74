"""TLVs: what a PROXY protocol header of version 2 can say beside the addresses."""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

Tlvs: TypeAlias = tuple[tuple[int, bytes], ...]
"""Types and values, in the order in which they are sent."""

_HEAD = struct.Struct("!BH")
_SSL_HEAD = struct.Struct("!BI")

# RFC 4960, appendix B: Castagnoli's polynomial, bits reversed.
_CRC32C_POLYNOMIAL = 0x82F63B78


class ProxyTlvType(enum.IntEnum):
    """The registered types of TLVs. 0xE0 to 0xEF are for your own."""

    ALPN = 0x01
    AUTHORITY = 0x02
    CRC32C = 0x03
    NOOP = 0x04
    UNIQUE_ID = 0x05
    SSL = 0x20
    SSL_VERSION = 0x21
    SSL_CN = 0x22
    SSL_CIPHER = 0x23
    SSL_SIG_ALG = 0x24
    SSL_KEY_ALG = 0x25
    SSL_GROUP = 0x26
    SSL_SIG_SCHEME = 0x27
    SSL_CLIENT_CERT = 0x28
    NETNS = 0x30


# What is text, and in which encoding.
_TEXT = {
    ProxyTlvType.AUTHORITY: "utf-8",
    ProxyTlvType.NETNS: "ascii",
    ProxyTlvType.SSL_VERSION: "ascii",
    ProxyTlvType.SSL_CN: "utf-8",
    ProxyTlvType.SSL_CIPHER: "ascii",
    ProxyTlvType.SSL_SIG_ALG: "ascii",
    ProxyTlvType.SSL_KEY_ALG: "ascii",
    ProxyTlvType.SSL_GROUP: "ascii",
    ProxyTlvType.SSL_SIG_SCHEME: "ascii",
}

_UNIQUE_ID_MAX = 128

CRC32C_SIZE = 4


def split_tlvs(data: bytes) -> Tlvs:
    """Take *data* apart. Raises `ValueError` if it is not TLVs from end to end."""
    found: list[tuple[int, bytes]] = []
    at = 0
    while at < len(data):
        if at + _HEAD.size > len(data):
            raise ValueError(f"a TLV of {len(data) - at} bytes, which is too short for one")
        kind, size = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if at + size > len(data):
            raise ValueError(f"a TLV of type {kind:#04x} reaches beyond the end")
        found.append((kind, data[at : at + size]))
        at += size
    return tuple(found)


def join_tlvs(tlvs: Tlvs) -> bytes:
    """The bytes of *tlvs*."""
    return b"".join(_HEAD.pack(kind, len(value)) + value for kind, value in tlvs)


def checked_tlvs(owner: str, tlvs: Iterable[tuple[int, bytes]]) -> Tlvs:
    """*tlvs* as they are kept. Raises `TypeError` or `ValueError` for what cannot be one, and for
    a registered type that comes twice: two readers could take a different one of them.
    """
    kept: list[tuple[int, bytes]] = []
    seen: set[int] = set()
    for kind, value in tlvs:
        if type(value) is not bytes:
            raise TypeError(f"{owner}: a TLV's value is {value!r}: pass bytes")
        if not 0 <= kind <= 0xFF:
            raise ValueError(f"{owner}: a TLV's type is {kind!r}: pass 0 to 255")
        if len(value) > 0xFFFF:
            raise ValueError(f"{owner}: a TLV of {len(value)} bytes: the most is 65535")
        if kind in _REGISTERED and kind in seen:
            raise ValueError(f"{owner}: two TLVs of type {ProxyTlvType(kind).name}")
        seen.add(kind)
        if kind in _TEXT:
            try:
                value.decode(_TEXT[ProxyTlvType(kind)])
            except UnicodeDecodeError as error:
                name = ProxyTlvType(kind).name
                raise ValueError(f"{owner}: {name} is no {error.encoding} text") from None
        elif kind == ProxyTlvType.UNIQUE_ID and len(value) > _UNIQUE_ID_MAX:
            raise ValueError(
                f"{owner}: UNIQUE_ID has {len(value)} bytes: the most is {_UNIQUE_ID_MAX}"
            )
        kept.append((int(kind), value))
    return tuple(kept)


_REGISTERED = frozenset(ProxyTlvType)


def find_tlv(tlvs: Tlvs, kind: int) -> bytes | None:
    """The first value of that type, or None."""
    return next((value for found, value in tlvs if found == kind), None)


def text_of(tlvs: Tlvs, kind: ProxyTlvType) -> str | None:
    """The text of that type, or None."""
    value = find_tlv(tlvs, kind)
    return None if value is None else value.decode(_TEXT[kind])


@cache
def _crc32c_table() -> tuple[int, ...]:
    table: list[int] = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (_CRC32C_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


def crc32c(data: bytes) -> int:
    """The checksum of a header, in which its own four bytes are zero."""
    table = _crc32c_table()
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True, slots=True)
class ProxySsl:
    """What a proxy tells of the TLS that it ended for the client."""

    client: int = 0x01
    """Bits: 1 the client used TLS; 2 it gave a certificate on this connection; 4 in this session.
    Use `tls`, `certificate` and `verified`."""
    verify: int = 1
    """The proxy's verdict on that certificate: 0 is good. Also 0, with some, if there is none."""
    tlvs: Tlvs = ()
    """The TLVs inside, in their order."""

    def __post_init__(self) -> None:
        if not 0 <= self.client <= 0xFF:
            raise ValueError(f"ProxySsl(client={self.client!r}): pass 8 bits")
        if not 0 <= self.verify <= 0xFFFFFFFF:
            raise ValueError(f"ProxySsl(verify={self.verify!r}): pass 32 bits, 0 for verified")
        object.__setattr__(self, "tlvs", checked_tlvs("ProxySsl", self.tlvs))

    @property
    def tls(self) -> bool:
        """Whether the client came by TLS."""
        return bool(self.client & 0x01)

    @property
    def certificate(self) -> bool:
        """Whether it has given a certificate, on this connection or before in the session."""
        return bool(self.client & 0x06)

    @property
    def verified(self) -> bool:
        """Whether it has given a certificate that the proxy found good."""
        return self.tls and self.certificate and self.verify == 0

    @property
    def version(self) -> str | None:
        """TLS's version, such as ``TLSv1.3``."""
        return text_of(self.tlvs, ProxyTlvType.SSL_VERSION)

    @property
    def common_name(self) -> str | None:
        """The common name in the client's certificate: look at `verified` first."""
        return text_of(self.tlvs, ProxyTlvType.SSL_CN)

    @property
    def cipher(self) -> str | None:
        """The cipher's name."""
        return text_of(self.tlvs, ProxyTlvType.SSL_CIPHER)

    @property
    def signature_algorithm(self) -> str | None:
        """What the proxy's own certificate is signed with."""
        return text_of(self.tlvs, ProxyTlvType.SSL_SIG_ALG)

    @property
    def key_algorithm(self) -> str | None:
        """The kind and size of the key in the proxy's own certificate."""
        return text_of(self.tlvs, ProxyTlvType.SSL_KEY_ALG)

    @property
    def group(self) -> str | None:
        """The key exchange's group."""
        return text_of(self.tlvs, ProxyTlvType.SSL_GROUP)

    @property
    def signature_scheme(self) -> str | None:
        """What the proxy signed the handshake with."""
        return text_of(self.tlvs, ProxyTlvType.SSL_SIG_SCHEME)

    @property
    def client_certificate(self) -> bytes | None:
        """The client's certificate, in DER: look at `verified` first."""
        return find_tlv(self.tlvs, ProxyTlvType.SSL_CLIENT_CERT)

    def encode(self) -> bytes:
        """The value of a TLV of type SSL."""
        return _SSL_HEAD.pack(self.client, self.verify) + join_tlvs(self.tlvs)

    @classmethod
    def decode(cls, value: bytes) -> ProxySsl:
        """The opposite. Raises `ValueError` for what is none."""
        if len(value) < _SSL_HEAD.size:
            raise ValueError(f"ProxySsl: {len(value)} bytes are too few for one")
        client, verify = _SSL_HEAD.unpack_from(value)
        return cls(client=client, verify=verify, tlvs=split_tlvs(value[_SSL_HEAD.size :]))
