"""ProxyHeader: what it says is what was meant, on the wire as the protocol has it."""

from __future__ import annotations

import dataclasses
import socket
from typing import Any

import pytest

from trioreactor import ProxyHeader, ProxySsl, ProxyTlvType, encode_proxy_header

pytestmark = pytest.mark.pure

V4 = ("192.0.2.1", 56324)
V4_TO = ("198.51.100.2", 443)
V6 = ("2001:db8::1", 56324, 0, 0)
V6_TO = ("2001:db8::2", 443, 0, 0)
SIGNATURE = bytes.fromhex("0D0A0D0A000D0A515549540A")


def test_lines() -> None:
    """Version 1, to the letter."""
    assert encode_proxy_header(1, V4, V4_TO) == b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n"
    assert encode_proxy_header(1, V6, V6_TO) == b"PROXY TCP6 2001:db8::1 2001:db8::2 56324 443\r\n"
    for source, destination in ((None, None), ("/run/a", "/run/b")):
        assert encode_proxy_header(1, source, destination) == b"PROXY UNKNOWN\r\n"
    udp = ProxyHeader(V4, V4_TO, version=1, transport="dgram")
    assert udp.encode() == b"PROXY UNKNOWN\r\n"


def test_blocks() -> None:
    """Version 2, to the bit."""
    ports = (56324).to_bytes(2, "big") + (443).to_bytes(2, "big")
    assert encode_proxy_header(2, V4, V4_TO) == (
        SIGNATURE + b"\x21\x11\0\x0c" + bytes([192, 0, 2, 1, 198, 51, 100, 2]) + ports
    )
    hosts = b"".join(socket.inet_pton(socket.AF_INET6, end[0]) for end in (V6, V6_TO))
    assert encode_proxy_header(2, V6, V6_TO) == SIGNATURE + b"\x21\x21\0\x24" + hosts + ports
    paths = b"/run/a".ljust(108, b"\0") + b"\0name".ljust(108, b"\0")
    unix = encode_proxy_header(2, "/run/a", b"\0name")
    assert unix == SIGNATURE + b"\x21\x31\0\xd8" + paths
    assert encode_proxy_header(2, None, None) == SIGNATURE + b"\x21\0\0\0"
    assert encode_proxy_header(2, None, None, command="LOCAL") == SIGNATURE + b"\x20\0\0\0"
    udp = ProxyHeader(V4, V4_TO, transport="dgram").encode()
    assert udp[13] == 0x12
    tlvs = encode_proxy_header(2, None, None, tlvs={ProxyTlvType.ALPN: b"h2", 0xE0: b""})
    assert tlvs == SIGNATURE + b"\x21\0\0\x08" + b"\1\0\2h2" + b"\xe0\0\0"
    assert encode_proxy_header(2, None, None, tlvs=((1, b"h2"), (0xE0, b""))) == tlvs


def test_what_it_tells() -> None:
    """Registered types have names, others are asked for by number."""
    ssl = ProxySsl(client=1, tlvs=((ProxyTlvType.SSL_VERSION, b"TLSv1.2"),))
    header = ProxyHeader(
        V4,
        V4_TO,
        tlvs=(
            (ProxyTlvType.ALPN, b"h2"),
            (ProxyTlvType.AUTHORITY, "bücher.example".encode()),
            (ProxyTlvType.UNIQUE_ID, b"\x00\x01"),
            (ProxyTlvType.SSL, ssl.encode()),
            (ProxyTlvType.NETNS, b"blue"),
            (0xE5, b"ours"),
        ),
    )
    assert header.alpn == b"h2"
    assert header.authority == "bücher.example"
    assert header.unique_id == b"\x00\x01"
    assert header.ssl == ssl
    assert header.network_namespace == "blue"
    assert header.tlv(0xE5) == b"ours"
    silent = ProxyHeader()
    assert silent.alpn is silent.authority is silent.unique_id is silent.ssl is None
    assert silent.network_namespace is silent.tlv(0xE5) is silent.source is None
    assert hash(header) != hash(silent)


def test_padding_and_checksum_say_nothing() -> None:
    """They are about the header and not of it, so it can be sent on as it is."""
    header = ProxyHeader(tlvs=((ProxyTlvType.NOOP, b"..."), (1, b"h2"), (3, bytes(4))))
    assert header.tlvs == ((1, b"h2"),)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (("::1", 1), ("::1", 1, 0, 0)),
        (("2001:DB8:0:0::1", 1, 7, 9), ("2001:db8::1", 1, 0, 0)),
        (("fe80::1%eth0", 1, 0, 2), ("fe80::1", 1, 0, 0)),
        (("::ffff:192.0.2.1", 1, 0, 0), ("::ffff:192.0.2.1", 1, 0, 0)),
        (b"/run/a", "/run/a"),
        ("\0name", b"\0name"),
        (b"", ""),
        (b"/run/\xff", "/run/\udcff"),
    ],
)
def test_addresses_are_kept_in_one_way(given: Any, kept: Any) -> None:
    """That of the socket module, without what means nothing on another machine."""
    assert ProxyHeader(given, given).source == kept


def test_mixed_families() -> None:
    """A header has one family: IPv4 is written inside IPv6."""
    header = ProxyHeader(V4, V6_TO)
    assert header.source == ("::ffff:192.0.2.1", 56324, 0, 0)
    assert header.destination == V6_TO
    line = b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8::2 56324 443\r\n"
    assert encode_proxy_header(1, V4, V6_TO) == line
    assert ProxyHeader(V6, V4_TO).destination == ("::ffff:198.51.100.2", 443, 0, 0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"version": 3}, "pass 1 or 2"),
        ({"command": "PUT"}, '"LOCAL"'),
        ({"transport": "tcp"}, '"stream"'),
        ({"source": V4}, "both"),
        ({"destination": V4}, "both"),
        ({"source": V4, "destination": V4, "command": "LOCAL"}, "no addresses"),
        ({"source": V4, "destination": "/run/a"}, "Unix"),
        ({"source": "/run/a", "destination": V4}, "Unix"),
        ({"source": ("192.0.2.256", 1), "destination": V4}, "192.0.2.256"),
        ({"source": ("localhost", 1), "destination": V4}, "localhost"),
        ({"source": ("192.0.2.1", 65536), "destination": V4}, "65535"),
        ({"source": ("192.0.2.1", -1), "destination": V4}, "65535"),
        ({"source": ("192.0.2.1", True), "destination": V4}, "65535"),
        ({"source": "/" * 109, "destination": "/"}, "longer"),
        ({"version": 1, "tlvs": ((1, b""),)}, "version 1"),
        ({"version": 1, "command": "LOCAL"}, "version 1"),
        ({"version": 1, "checksum": True}, "version 1"),
        ({"tlvs": ((ProxyTlvType.SSL, b""),)}, "too few"),
        ({"tlvs": ((1, b""), (1, b""))}, "two TLVs"),
    ],
)
def test_refused(options: dict[str, Any], text: str) -> None:
    """What cannot be said is refused where it is made."""
    with pytest.raises(ValueError, match=text):
        ProxyHeader(**options)


def test_too_long() -> None:
    """The length has 16 bits."""
    header = ProxyHeader(tlvs=((0xE0, bytes(65532)),))
    assert len(header.encode()) == 16 + 65535
    with pytest.raises(ValueError, match="65535"):
        dataclasses.replace(header, checksum=True).encode()
