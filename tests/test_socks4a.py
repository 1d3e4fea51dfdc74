"""The SOCKS4a proxy: curl gets through it; nonsense, however it is cut up, gets nowhere."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import connect, echo, no_leaks, reset, serving, until
from tests.servers import closed, installed, local, rest_of, server_process, unused_port
from tests.test_examples import ROOT, load, read_exactly
from trioreactor import CloseReason, ProtocolError, TcpServer

GRANTED = b"\0\x5a\0\0\0\0\0\0"
REJECTED = b"\0\x5b\0\0\0\0\0\0"

Request = tuple[int, str, int, bytes]


def request(
    port: int, host: str = "", *, address: str = "", command: int = 1, user: bytes = b"ann"
) -> bytes:
    """A request's bytes: for an address, or else for a name."""
    head = struct.pack("!BBH4s", 4, command, port, socket.inet_aton(address or "0.0.0.1"))
    return head + user + b"\0" + (b"" if address else host.encode("latin-1") + b"\0")


@pytest.fixture
def socks4a(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example. It imports another, as a program from its directory does."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return load("socks4a")


@asynccontextmanager
async def proxy(socks4a: ModuleType) -> AsyncIterator[tuple[TcpServer, Any]]:
    """A server with the example's handler, and its address; nothing of it is left afterwards."""
    server = local(socks4a.proxy)
    async with no_leaks(), serving(server) as address:
        yield server, address


@asynccontextmanager
async def proxy_and_target(socks4a: ModuleType) -> AsyncIterator[tuple[TcpServer, Any, int]]:
    """The same, and a port where an echo server listens."""
    server = local(socks4a.proxy)
    async with no_leaks(), serving(local(echo)) as target, serving(server) as address:
        yield server, address, target[1]


class Names(trio.abc.HostnameResolver):
    """A resolver that knows one name, and says what it was asked."""

    def __init__(self, known: str) -> None:
        self.known = known
        self.asked: list[str] = []

    async def getaddrinfo(self, host: Any, port: Any, *args: Any, **options: Any) -> Any:
        name = host.decode("ascii")
        self.asked.append(name)
        if name != self.known:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    async def getnameinfo(self, *args: Any) -> Any:
        raise AssertionError("nobody asks for an address's name")


# -- the request


REQUESTS = [
    (request(80, address="127.0.0.1"), (1, "127.0.0.1", 80)),
    (request(65535, address="0.0.0.0", user=b""), (1, "0.0.0.0", 65535)),
    (request(1, address="0.0.1.0"), (1, "0.0.1.0", 1)),
    (request(443, "example.test"), (1, "example.test", 443)),
    (request(443, "h", user=b"", command=2), (2, "h", 443)),
    (request(80, "x" * 255, user=b"y" * 255), (1, "x" * 255, 80)),
]


@pytest.mark.parametrize(("data", "expected"), REQUESTS)
@pytest.mark.parametrize("rest", [b"", b"\0", b"GET / HTTP/1.0\r\n\0\r\n"])
def test_requests(socks4a: ModuleType, data: bytes, expected: Request, rest: bytes) -> None:
    """A request is complete with its last byte, not before; what follows is left as it is."""
    for end in range(1, len(data)):
        assert socks4a.parse(data[:end]) is None
    assert socks4a.parse(data + rest) == (*expected, rest)


@pytest.mark.parametrize(
    "data",
    [
        b"\5\1\0",
        b"GET / HTTP/1.1\r\n",
        request(80, address="127.0.0.1", command=0),
        request(80, "host", command=3),
        request(0, address="127.0.0.1"),
        request(0, "host"),
        request(80, ""),
        request(80, address="127.0.0.1")[:-1] + b"x" * 600,
        request(80, "x" * 600),
        request(80, "host", user=b"x" * 600),
    ],
)
def test_nonsense(socks4a: ModuleType, data: bytes) -> None:
    """Another protocol, an unknown command, a missing port or host and a request without an end
    are each a ProtocolError: when they are as long as the longest request at the latest.
    """
    with pytest.raises(ProtocolError):
        for end in range(1, socks4a.LONGEST_REQUEST + 1):
            assert socks4a.parse(data[:end]) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(
        st.binary(min_size=1, max_size=520),
        st.builds(
            lambda head, text: b"\4" + head + text,
            st.binary(min_size=7, max_size=7),
            st.lists(st.sampled_from([b"\0", b"a", b"\xff", b"\r\n"]), max_size=512).map(b"".join),
        ),
    )
)
def test_any_bytes(socks4a: ModuleType, data: bytes) -> None:
    """Whatever comes is a request, the beginning of one, or a ProtocolError."""
    try:
        found = socks4a.parse(data)
    except ProtocolError:
        return
    if found is None:
        assert len(data) < 520
    else:
        command, host, port, rest = found
        assert command in (1, 2)
        assert host
        assert port
        assert data.endswith(rest)


# -- the proxy


@pytest.mark.parametrize("by", ["name", "address"])
async def test_connect(socks4a: ModuleType, by: str) -> None:
    """The request may come byte by byte, and what follows it at once; both ends then speak."""
    async with proxy_and_target(socks4a) as (_, address, port):
        where = {"host": "localhost"} if by == "name" else {"address": "127.0.0.1"}
        data = request(port, **where)
        async with connect(address) as client:
            for byte in data[:-1]:
                await client.send_all(bytes([byte]))
                await trio.testing.wait_all_tasks_blocked()
            await client.send_all(data[-1:] + b"early")
            assert await read_exactly(client, 13) == GRANTED + b"early"
            await client.send_all(b"late")
            await client.send_eof()
            assert await rest_of(client) == b"late"


async def test_names_are_resolved_here(socks4a: ModuleType) -> None:
    """The proxy asks its own resolver; a name that this does not know is rejected."""
    names = Names("backend.test")
    trio.socket.set_custom_hostname_resolver(names)
    async with proxy_and_target(socks4a) as (_, address, port):
        async with connect(address) as client:
            await client.send_all(request(port, "backend.test"))
            assert await read_exactly(client, 8) == GRANTED
            await client.send_all(b"hello")
            assert await read_exactly(client, 5) == b"hello"
        for name in ("other.test", "a b\xe4c/../d"):
            async with connect(address) as client:
                await client.send_all(request(port, name))
                assert await rest_of(client) == REJECTED
    assert names.asked[:2] == ["backend.test", "other.test"]


async def test_rejected(socks4a: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    """BIND, and a port where nobody listens, are rejected in SOCKS's words; nobody is alarmed."""
    with unused_port() as refused:
        async with proxy_and_target(socks4a) as (_, address, port):
            for data in (
                request(refused, address="127.0.0.1"),
                request(refused, "localhost"),
                request(port, address="127.0.0.1", command=2),
                request(port, "localhost", command=2),
            ):
                async with connect(address) as client:
                    await client.send_all(data)
                    assert await rest_of(client) == REJECTED
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


async def test_nonsense_is_closed(socks4a: ModuleType) -> None:
    """Nonsense ends its own connection, as a protocol error, and the others go on."""
    async with proxy_and_target(socks4a) as (server, address, port), connect(address) as good:
        await good.send_all(request(port, "localhost"))
        assert await read_exactly(good, 8) == GRANTED
        for count, data in enumerate((b"GET / HTTP/1.1\r\n\r\n", b"\4\1" + b"x" * 100_000), 1):
            async with connect(address) as bad:
                await bad.send_all(data)
                assert await rest_of(bad) == b""
            await until(lambda: len(server.connections) == 1)
            assert closed(server) == {CloseReason.PROTOCOL_ERROR: count}
        await good.send_all(b"hello")
        assert await read_exactly(good, 5) == b"hello"


async def test_a_slow_request(socks4a: ModuleType, mock_clock: trio.testing.MockClock) -> None:
    """Promise D: one who has not said all within the seconds is closed, though each byte came."""
    data = request(80, "x" * 100)
    async with proxy(socks4a) as (server, address):
        slow, silent = connect(address), connect(address)
        for byte in data[: socks4a.REQUEST_SECONDS]:
            assert len(server.connections) in (0, 2)
            await slow.send_all(bytes([byte]))
            await trio.testing.wait_all_tasks_blocked(0.01)
            mock_clock.jump(1)
        for client in (slow, silent):
            assert await client.receive_some() == b""
            await client.aclose()


async def test_clients_that_leave(socks4a: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    """Closing or resetting before the request is complete, at any byte, is no error."""
    data = request(80, "localhost")
    async with proxy(socks4a) as (server, address):
        for end in range(len(data)):
            for leave in (reset, socket.socket.close):
                client = socket.create_connection(address)
                client.send(data[:end])
                leave(client)
        await until(lambda: server.statistics().opened == 2 * len(data))
        await until(lambda: not server.connections)
        assert set(closed(server)) <= {CloseReason.PEER_EOF, CloseReason.PEER_RESET}
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


# -- curl

NGINX = """
daemon off;
master_process off;
pid {directory}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {directory};
    }}
}}
"""


@asynccontextmanager
async def nginx(directory: Path, port: int) -> AsyncIterator[None]:
    """nginx, on that port of loopback, with the directory's files."""
    program = installed("nginx")
    config = directory / "nginx.conf"
    config.write_text(NGINX.format(directory=directory, port=port))
    async with server_process(port, program, "-e", "stderr", "-p", directory, "-c", config):
        yield


async def curl(*arguments: object) -> tuple[int, bytes]:
    """What curl returns, and what it prints."""
    # No configuration and no proxies but those that are named.
    done = await trio.run_process(
        [installed("curl"), "-q", "--silent", "--max-time", "20", *map(str, arguments)],
        env={"PATH": os.environ.get("PATH", "")},
        capture_stdout=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("option", ["--socks4a", "--socks4"])
async def test_curl(socks4a: ModuleType, tmp_path: Path, option: str) -> None:
    """curl gets files from nginx through the proxy, by a name that the proxy resolves and by one
    that curl does; several at once; and a port that refuses gives curl's error for that.
    """
    content = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "empty").touch()
    with unused_port() as port, unused_port() as refused:
        async with nginx(tmp_path, port), proxy(socks4a) as (server, address):
            via = (option, "{}:{}".format(*address))
            for name in ("localhost", "127.0.0.1"):
                assert await curl(*via, f"http://{name}:{port}/file") == (0, content)
                assert await curl(*via, f"http://{name}:{port}/empty") == (0, b"")
                # 97: the proxy's answer was no.
                assert await curl(*via, f"http://{name}:{refused}/") == (97, b"")

            async def get() -> None:
                assert await curl(*via, f"http://localhost:{port}/file") == (0, content)

            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(get)
            await until(lambda: not server.connections)
            assert server.statistics().opened == 10
