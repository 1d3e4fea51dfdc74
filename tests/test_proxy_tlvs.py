"""TLVs: taken apart and put together again, and nothing that two readers could read differently."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trioreactor import ProxySsl, ProxyTlvType
from trioreactor.proxy_tlvs import checked_tlvs, crc32c, join_tlvs, split_tlvs

pytestmark = pytest.mark.pure

pure = settings(deadline=None, derandomize=True, max_examples=60)

some_tlvs = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=20)), max_size=5).map(tuple)


@pure
@given(some_tlvs)
def test_there_and_back(tlvs: tuple[tuple[int, bytes], ...]) -> None:
    """What is joined is split into the same, in the same order."""
    assert split_tlvs(join_tlvs(tlvs)) == tlvs


@pure
@given(some_tlvs, st.data())
def test_cut_off(tlvs: tuple[tuple[int, bytes], ...], data: st.DataObject) -> None:
    """A cut anywhere but between two is an error, never a shorter TLV."""
    joined = join_tlvs(tlvs)
    at = data.draw(st.integers(0, len(joined)))
    whole = [tlvs[:n] for n in range(len(tlvs) + 1)]
    lengths = {len(join_tlvs(some)): some for some in whole}
    if at in lengths:
        assert split_tlvs(joined[:at]) == lengths[at]
    else:
        with pytest.raises(ValueError, match="TLV"):
            split_tlvs(joined[:at])


@pytest.mark.parametrize(
    ("data", "checksum"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        # RFC 3720, B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_checksum(data: bytes, checksum: int) -> None:
    """CRC32C as others reckon it."""
    assert crc32c(data) == checksum


@pytest.mark.parametrize(
    ("tlvs", "error", "text"),
    [
        ([(256, b"")], ValueError, "0 to 255"),
        ([(-1, b"")], ValueError, "0 to 255"),
        ([(0xE0, "text")], TypeError, "pass bytes"),
        ([(0xE0, bytes(65536))], ValueError, "65535"),
        ([(ProxyTlvType.AUTHORITY, b"\xff")], ValueError, "AUTHORITY is no utf-8 text"),
        ([(ProxyTlvType.NETNS, "é".encode())], ValueError, "NETNS is no ascii text"),
        ([(ProxyTlvType.UNIQUE_ID, bytes(129))], ValueError, "128"),
        ([(ProxyTlvType.ALPN, b"h2"), (0xE0, b""), (1, b"h3")], ValueError, "two TLVs of .* ALPN"),
    ],
)
def test_refused(tlvs: list[tuple[int, bytes]], error: type[Exception], text: str) -> None:
    """What no TLV can be, what is not what its type says, and what is said twice."""
    with pytest.raises(error, match=text):
        checked_tlvs("owner", tlvs)


def test_ones_own_may_come_twice() -> None:
    """What a type of one's own means is one's own."""
    twice = ((0xE0, b"a"), (0xE0, b"b"))
    assert checked_tlvs("owner", twice) == twice


def test_ssl_there_and_back() -> None:
    """Everything in it has a name."""
    values = {
        ProxyTlvType.SSL_VERSION: b"TLSv1.3",
        ProxyTlvType.SSL_CN: "Zoë".encode(),
        ProxyTlvType.SSL_CIPHER: b"TLS_AES_256_GCM_SHA384",
        ProxyTlvType.SSL_SIG_ALG: b"RSA-SHA256",
        ProxyTlvType.SSL_KEY_ALG: b"RSA2048",
        ProxyTlvType.SSL_GROUP: b"secp256r1",
        ProxyTlvType.SSL_SIG_SCHEME: b"rsa_pss_rsae_sha256",
        ProxyTlvType.SSL_CLIENT_CERT: b"\x30\x82",
    }
    ssl = ProxySsl(client=7, verify=0, tlvs=tuple(values.items()))
    again = ProxySsl.decode(ssl.encode())
    assert again == ssl
    assert (again.tls, again.certificate, again.verified) == (True, True, True)
    assert again.version == "TLSv1.3"
    assert again.common_name == "Zoë"
    assert again.cipher == "TLS_AES_256_GCM_SHA384"
    assert (again.signature_algorithm, again.key_algorithm) == ("RSA-SHA256", "RSA2048")
    assert (again.group, again.signature_scheme) == ("secp256r1", "rsa_pss_rsae_sha256")
    assert again.client_certificate == b"\x30\x82"
    assert ProxySsl().version is ProxySsl().client_certificate is None


@pytest.mark.parametrize(
    ("client", "verify", "verified"),
    # haproxy's verdict on no certificate is 0, too.
    [(1, 0, False), (3, 0, True), (5, 0, True), (3, 1, False), (2, 0, False), (0, 0, False)],
)
def test_verified(client: int, verify: int, verified: bool) -> None:
    """Only who came by TLS and gave a certificate has one that was found good."""
    assert ProxySsl(client=client, verify=verify).verified is verified


@pytest.mark.parametrize("value", [b"", bytes(4), bytes(5) + b"\x21\0\2x", bytes(6)])
def test_no_ssl(value: bytes) -> None:
    """What is too short, and what is no TLVs inside."""
    with pytest.raises(ValueError, match=r"ProxySsl|TLV"):
        ProxySsl.decode(value)


@pytest.mark.parametrize("options", [{"client": 256}, {"client": -1}, {"verify": 2**32}])
def test_ssl_options(options: dict[str, int]) -> None:
    """Fields have their size."""
    with pytest.raises(ValueError, match="bits"):
        ProxySsl(**options)
