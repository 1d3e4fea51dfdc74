"""Real proxies, haproxy and nginx, before a server that is to know its clients."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from tests.conftest import connect, no_leaks, serving, until
from tests.servers import assert_echoes, installed, local, server_process, unused_port
from tests.test_examples import read_to_eof, running
from trioreactor import (
    CloseReason,
    Limits,
    ProxyHeader,
    ProxyProtocol,
    TcpConnection,
    open_tcp_connection,
)

pytestmark = pytest.mark.program

HAPROXY = r"""
global
    maxconn 200

defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    unique-id-format %ci:%cp

listen line
    bind fd@{line}
    bind fd@{line6}
    bind unix@{directory}/line.sock
    server only 127.0.0.1:{back} send-proxy check inter 50ms

listen block
    bind fd@{block}
    server only 127.0.0.1:{back} send-proxy-v2 proxy-v2-options unique-id,crc32c check inter 50ms

listen tls
    bind fd@{tls} ssl crt {directory}/server.pem ca-file {directory}/ca.pem verify optional
    server only 127.0.0.1:{back} send-proxy-v2 proxy-v2-options {options}

listen chain
    bind fd@{chain} accept-proxy
    server only 127.0.0.1:{back} send-proxy-v2
"""

OPTIONS = "ssl,cert-cn,ssl-cipher,cert-sig,cert-key,authority,crc32c"

FRONTS = ("line", "block", "tls", "chain")

NGINX = """
daemon off;
master_process off;
pid {directory}/nginx.pid;
error_log stderr;
{load}
events {{ worker_connections 64; }}
stream {{
    server {{
        listen 127.0.0.1:{port};
        proxy_pass 127.0.0.1:{back};
        proxy_protocol on;
    }}
}}
"""

NGINX_STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


@dataclass
class Seen:
    """An echo that keeps what it was told of those whom it has served."""

    served: list[TcpConnection] = field(default_factory=list)

    async def __call__(self, conn: TcpConnection) -> None:
        self.served.append(conn)
        async for chunk in conn:
            await conn.send_all(chunk)

    def headers_of(self, source: Any) -> list[ProxyHeader]:
        """Of those that are said to come from there."""
        headers = [conn.proxy_header for conn in self.served]
        return [each for each in headers if each is not None and each.source == source]


def trusting(**options: Any) -> ProxyProtocol:
    return ProxyProtocol(trusted=["127.0.0.1"], **options)


@dataclass
class Front:
    """haproxy, and where it listens."""

    addresses: dict[str, Any]
    directory: Path
    authority: trustme.CA

    def at(self, name: str, source: str = "127.0.0.1") -> trio.SocketStream:
        return connect(self.addresses[name][:2], source=source)


@asynccontextmanager
async def haproxy(back: Any, directory: Path) -> AsyncIterator[Front]:
    """haproxy before the server at that address; its fronts."""
    program = installed("haproxy")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    authority.issue_cert("whoami.example").private_key_and_cert_chain_pem.write_to_path(
        directory / "server.pem"
    )
    socks = {name: socket.create_server(("127.0.0.1", 0)) for name in FRONTS}
    socks["line6"] = socket.create_server(("::1", 0), family=socket.AF_INET6)
    config = directory / "haproxy.cfg"
    numbers = {name: sock.fileno() for name, sock in socks.items()}
    config.write_text(HAPROXY.format(back=back[1], directory=directory, options=OPTIONS, **numbers))
    process = await trio.lowlevel.open_process(
        [program, "-db", "-f", str(config)],
        pass_fds=list(numbers.values()),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield Front({n: sock.getsockname() for n, sock in socks.items()}, directory, authority)
    finally:
        for sock in socks.values():
            sock.close()
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def through_tls(front: Front, *, name: str | None) -> tuple[str, int]:
    """An echo by TLS, with a certificate of that common name, if one; where it came from."""
    # Not the default one, which takes its time for all the authorities that the system trusts.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    front.authority.configure_trust(context)
    if name is not None:
        front.authority.issue_cert("client.example", common_name=name).configure_cert(context)
    stream = front.at("tls")
    source = stream.socket.getsockname()
    async with trio.SSLStream(stream, context, server_hostname="whoami.example") as tls:
        await tls.send_all(b"hello")
        assert await tls.receive_some() == b"hello"
    return source  # type: ignore[no-any-return]


def quiet(caplog: pytest.LogCaptureFixture) -> bool:
    # A busy machine may hold the loop.
    return not [
        record
        for record in caplog.records
        if record.levelno >= logging.INFO and record.name != "trioreactor.watchdog"
    ]


async def test_haproxy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Both versions, both families, and checks: each client is known, and nobody notices these."""
    seen = Seen()
    async with (
        no_leaks(),
        serving(local(seen, proxy_protocol=trusting())) as back,
        haproxy(back, tmp_path) as front,
    ):
        for name, source in (("line", "127.0.0.7"), ("block", "127.0.0.8"), ("line6", "::1")):
            async with front.at(name, source) as client:
                await assert_echoes(client)
                ours = client.socket.getsockname()
                (header,) = seen.headers_of(ours)
                assert header.version == (2 if name == "block" else 1)
                assert header.destination == front.addresses[name]
                if name == "block":
                    assert header.checksum
                    assert header.unique_id == "{}:{}".format(*ours).encode()
                conn = next(c for c in seen.served if c.proxy_header is header)
                assert conn.peer_address == ours
                assert conn.proxy_address is not None
                assert conn.proxy_address[0] == "127.0.0.1"
        # Somebody whom the proxy knows no address of.
        async with await trio.open_unix_socket(tmp_path / "line.sock") as client:
            await assert_echoes(client)
            conn = seen.served[-1]
            assert conn.proxy_header == ProxyHeader(version=1)
            assert conn.peer_address == conn.proxy_address
        local_ones = ProxyHeader(command="LOCAL")
        await until(lambda: sum(c.proxy_header == local_ones for c in seen.served) > 2)
    assert quiet(caplog)


async def test_haproxys_tls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What haproxy knows by TLS that it ends: names, ciphers, and who has shown a certificate."""
    seen = Seen()
    async with (
        no_leaks(),
        serving(local(seen, proxy_protocol=trusting())) as back,
        haproxy(back, tmp_path) as front,
    ):
        for name in (None, "Zoë"):
            (header,) = seen.headers_of(await through_tls(front, name=name))
            assert header.authority == "whoami.example"
            assert header.checksum
            told = header.ssl
            assert told is not None
            assert told.tls
            assert told.version in ("TLSv1.2", "TLSv1.3")
            assert told.cipher
            assert told.signature_algorithm
            assert told.key_algorithm
            assert told.verified == (name is not None)
            assert told.common_name == name
    assert quiet(caplog)


async def test_limits_behind_haproxy(tmp_path: Path) -> None:
    """Each client has its own share, however many checks there are."""
    seen = Seen()
    server = local(seen, proxy_protocol=trusting(), limits=Limits(per_peer=1))
    async with no_leaks(), serving(server) as back, haproxy(back, tmp_path) as front:
        async with front.at("block", "127.0.0.7") as one, front.at("block", "127.0.0.8") as other:
            await assert_echoes(one)
            await assert_echoes(other)
            async with front.at("line", "127.0.0.7") as too_many:
                with trio.fail_after(10):
                    assert await too_many.receive_some() == b""
        assert server.statistics().rejected == {"per_peer": 1}
        assert server.statistics().closed[CloseReason.HANDSHAKE_FAILED] == 1


@pytest.mark.parametrize("version", [1, 2])
async def test_haproxy_believes_ours(tmp_path: Path, version: Any) -> None:
    """A header that we send is one for haproxy, which sends it on."""
    seen = Seen()
    client = ("203.0.113.9", 1234)
    header = ProxyHeader(client, ("198.51.100.2", 443), version=version)
    async with (
        no_leaks(),
        serving(local(seen, proxy_protocol=trusting(versions={2}))) as back,
        haproxy(back, tmp_path) as front,
    ):
        to = front.addresses["chain"]
        async with await open_tcp_connection(*to, proxy_protocol=header) as conn:
            await conn.send_all(b"hello")
            assert await conn.receive_some() == b"hello"
        (got,) = seen.headers_of(client)
        assert got.destination == header.destination


def load_stream() -> str:
    """nginx's directive that loads what proxies TCP. Where that is not, as `installed`."""
    built = subprocess.run([installed("nginx"), "-V"], capture_output=True, text=True, check=True)
    if re.search(r"--with-stream(\s|$)", built.stderr):
        return ""
    if not NGINX_STREAM.exists():
        text = "nginx has no stream module (Debian's libnginx-mod-stream)"
        if os.environ.get("TRIOREACTOR_REQUIRE_SERVERS") == "1":
            pytest.fail(f"{text}, and TRIOREACTOR_REQUIRE_SERVERS=1 wants it")
        pytest.skip(text)
    return f"load_module {NGINX_STREAM};"


async def test_nginx(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """nginx writes version 1."""
    load = load_stream()
    seen = Seen()
    config = tmp_path / "nginx.conf"
    command = (installed("nginx"), "-e", "stderr", "-p", tmp_path, "-c", config)
    async with no_leaks(), serving(local(seen, proxy_protocol=trusting())) as back:
        with unused_port() as port:
            config.write_text(NGINX.format(directory=tmp_path, load=load, port=port, back=back[1]))
            async with (
                server_process(port, *command),
                connect(("127.0.0.1", port), source="127.0.0.7") as client,
            ):
                await assert_echoes(client)
                ours = client.socket.getsockname()
                (header,) = seen.headers_of(ours)
                assert header == ProxyHeader(ours, ("127.0.0.1", port), version=1)
    assert quiet(caplog)


async def test_the_example(tmp_path: Path) -> None:
    """examples/whoami.py tells each client its own address, through haproxy and not without it."""
    async with running("whoami") as open_stream:
        direct = await open_stream()
        back = direct.socket.getpeername()
        # No header comes: it is left to the deadline, and the next ones are served.
        async with (
            direct,
            haproxy(back, tmp_path) as front,
            front.at("block", "127.0.0.7") as client,
        ):
            text = (await read_to_eof(client)).decode()
            ours = "{}:{}".format(*client.socket.getsockname())
            assert text.splitlines()[0] == f"you are {ours}"
            assert f"you wanted 127.0.0.1:{front.addresses['block'][1]}" in text
            assert f"its log calls you {ours}" in text
            proxy = re.search(r"the proxy is (.*):\d+\r", text)
            assert proxy is not None
            assert ipaddress.ip_address(proxy[1]).is_loopback
