"""Certificates, contexts and peers for TLS."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from tests.conftest import Pair, tcp_pair
from tests.simulated import SimulatedSocket, simulated
from trioreactor import TcpConnection

NAME = "localhost"

versions = pytest.mark.parametrize(
    "version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["tls1.2", "tls1.3"]
)


@cache
def authority() -> trustme.CA:
    """Whom both sides trust."""
    return trustme.CA()


@cache
def certificate(name: str = NAME) -> trustme.LeafCert:
    """A certificate for *name*, by the authority."""
    return authority().issue_cert(name)


def write_pem(directory: Path, name: str = NAME) -> tuple[Path, Path]:
    """The certificate with its key, and the authority's, as files."""
    own, trusted = directory / "own.pem", directory / "trusted.pem"
    certificate(name).private_key_and_cert_chain_pem.write_to_path(str(own))
    authority().cert_pem.write_to_path(str(trusted))
    return own, trusted


def server_context(
    version: ssl.TLSVersion | None = None, name: str = NAME, *, verify: bool = False
) -> ssl.SSLContext:
    """A server's; with *verify* it wants a certificate of the client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate(name).configure_cert(context)
    if version is not None:
        context.minimum_version = context.maximum_version = version
    if verify:
        authority().configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """A client's, which verifies."""
    # Not the default one, which takes its time for all the authorities that the system trusts.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority().configure_trust(context)
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


async def shake_hands(
    server: TcpConnection,
    client: TcpConnection,
    *,
    servers: ssl.SSLContext | None = None,
    clients: ssl.SSLContext | None = None,
    **options: Any,
) -> None:
    """Begin TLS between two connections; *options* are the client's."""
    options = {"server_hostname": NAME} | options
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await server.start_tls(servers or server_context(), server_side=True)

        nursery.start_soon(serve)
        await client.start_tls(clients or client_context(), server_side=False, **options)


async def tls_pair(
    version: ssl.TLSVersion | None = None, make: Callable[..., Awaitable[Pair]] = tcp_pair
) -> Pair:
    """A connected pair over TLS: the server, and the client."""
    server, client = await make()
    await shake_hands(server, client, servers=server_context(version), clients=client_context())
    return server, client


class TlsPeer:
    """The other end of a simulated socket: OpenSSL's client, whose every byte the test moves."""

    def __init__(self, sock: SimulatedSocket, version: ssl.TLSVersion | None = None) -> None:
        self.sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.tls = client_context(version).wrap_bio(
            self._incoming, self._outgoing, server_hostname=NAME
        )

    def take(self) -> None:
        """Take what has been written to it."""
        self._incoming.write(bytes(self.sock.output))
        self.sock.output.clear()

    def records(self, *messages: bytes) -> bytes:
        """Each of *messages* encrypted, in a row."""
        for message in messages:
            self.tls.write(message)
        return self._outgoing.read()

    def close_notify(self) -> bytes:
        """That, encrypted."""
        with suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        return self._outgoing.read()

    def received(self) -> bytes:
        """The plaintext of what has been written to it since."""
        self.take()
        got = bytearray()
        try:
            while data := self.tls.read(65536):
                got += data
        except ssl.SSLWantReadError:
            pass
        return bytes(got)

    async def shake_hands(self) -> None:
        """Its side of the handshake."""
        while True:
            self.take()
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.sock.peer_sends(self._outgoing.read())
                await trio.testing.wait_all_tasks_blocked()
            else:
                self.sock.peer_sends(self._outgoing.read())
                return


async def simulated_tls(
    version: ssl.TLSVersion | None = None, *, https_compatible: bool = False, **options: Any
) -> tuple[TcpConnection, TlsPeer]:
    """A server's connection on a socket of the test's own, TLS begun, and its peer."""
    conn, sock = simulated(**options)
    peer = TlsPeer(sock, version)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.shake_hands)
        await conn.start_tls(server_context(), server_side=True, https_compatible=https_compatible)
    peer.received()
    return conn, peer
