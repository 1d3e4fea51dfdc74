"""ProxyProtocol: a header from a trusted proxy or nothing; then it is its client's connection."""

from __future__ import annotations

import ipaddress
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import trustme
from trio.testing import MockClock

from tests.conftest import (
    accepted,
    cancelled_after,
    connect,
    everything,
    no_leaks,
    reset,
    serving,
    tcp_pair,
    until,
)
from tests.servers import assert_echoes, clients, closed, local, rest_of
from trioreactor import (
    Buffer,
    Callbacks,
    CloseReason,
    ConnectError,
    ConnectionState,
    Limits,
    ProxyHeader,
    ProxyProtocol,
    ProxyProtocolError,
    SocketAddress,
    TcpClient,
    TcpConnection,
    TcpServer,
    Timeouts,
    connecting,
    encode_proxy_header,
    open_tcp_connection,
    open_unix_acceptor,
    receive_proxy_header,
    serve_tcp,
)

CLIENT = ("192.0.2.1", 56324)
ENTRY = ("198.51.100.2", 443)
LOCAL = encode_proxy_header(2, None, None, command="LOCAL")
LINE = encode_proxy_header(1, CLIENT, ENTRY)
BLOCK = encode_proxy_header(2, CLIENT, ENTRY, tlvs={0xE0: b"more"}, checksum=True)
HEADERS = [LINE, BLOCK]

TRUSTING = ProxyProtocol(trusted=["127.0.0.1/32"])


def header_of(n: int) -> bytes:
    """A header of one of many clients."""
    return encode_proxy_header(2, (f"192.0.2.{n}", 1000 + n), ENTRY)


@dataclass
class Seen:
    """A handler, in either mode, that echoes, and keeps whom it served."""

    served: list[TcpConnection] = field(default_factory=list)

    async def coroutine(self, conn: TcpConnection) -> None:
        self.served.append(conn)
        async for chunk in conn:
            await conn.send_all(chunk)

    def message(self, conn: TcpConnection, buffer: Buffer) -> None:
        if conn not in self.served:
            self.served.append(conn)
        conn.send(buffer.take())

    def as_(self, mode: str) -> Any:
        return self.coroutine if mode == "coroutine" else Callbacks(message=self.message)

    @property
    def peers(self) -> list[SocketAddress]:
        return [conn.peer_address for conn in self.served]


either_mode = pytest.mark.parametrize("mode", ["coroutine", "dispatch"])
either_version = pytest.mark.parametrize("header", HEADERS, ids=["1", "2"])


@asynccontextmanager
async def behind(
    seen: Seen, mode: str = "coroutine", *, options: ProxyProtocol = TRUSTING, **more: Any
) -> AsyncIterator[TcpServer]:
    """A server behind a proxy, on loopback."""
    server = local(seen.as_(mode), proxy_protocol=options, **more)
    async with no_leaks(), serving(server):
        yield server


def where(server: TcpServer) -> Any:
    return server.addresses[0][:2]


# -- the header, and what follows it


@either_mode
@either_version
async def test_the_client_is_the_peer(header: bytes, mode: str) -> None:
    """B: the client's addresses, and every byte behind the header, though all came at once."""
    seen = Seen()
    async with behind(seen, mode) as server, connect(where(server)) as proxy:
        ours = proxy.socket.getsockname()
        await proxy.send_all(header + b"hello")
        got = b""
        while len(got) < 5:
            got += await proxy.receive_some()
        assert got == b"hello"
        (conn,) = seen.served
        assert conn.peer_address == CLIENT
        assert conn.proxy_address == ours
        assert conn.local_address == where(server)
        assert conn.proxy_header is not None
        assert conn.proxy_header.destination == ENTRY
        assert conn.proxy_header.tlv(0xE0) == (b"more" if header is BLOCK else None)
        assert conn.statistics().bytes_received == 5
        assert conn.state is ConnectionState.CONNECTED


@either_mode
@either_version
async def test_cut_anywhere(header: bytes, mode: str) -> None:
    """Cut at every byte, with the rest much later, the payload is whole."""
    seen = Seen()
    data = header + b"hello"
    async with behind(seen, mode) as server, clients(where(server), len(data)) as proxies:
        for n, proxy in enumerate(proxies):
            await proxy.send_all(data[:n])
        # A handler begins at the header's last byte, a callback is called at the client's first.
        least = len(header) + (mode == "dispatch")
        expected = sum(n >= least for n in range(len(data)))
        await until(lambda: len(seen.served) == expected)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert len(seen.served) == expected
        for n, proxy in enumerate(proxies):
            await proxy.send_all(data[n:])
            await proxy.send_eof()
        for proxy in proxies:
            assert await everything(proxy) == b"hello"
        assert seen.peers == [CLIENT] * len(data)


async def test_byte_by_byte() -> None:
    """The same with each byte in a segment of its own."""
    for header in HEADERS:
        seen = Seen()
        async with behind(seen) as server, connect(where(server)) as proxy:
            proxy.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            for at in range(len(header)):
                await proxy.send_all(header[at : at + 1])
                await trio.testing.wait_all_tasks_blocked()
            await assert_echoes(proxy)
            assert seen.peers == [CLIENT]


@either_mode
@pytest.mark.parametrize(
    "header",
    [
        LOCAL,
        encode_proxy_header(1, None, None),
        encode_proxy_header(2, None, None),
        b"PROXY UNKNOWN 1.2.3.4 1.2.3.4 1 2\r\n",
    ],
)
async def test_of_nobody(header: bytes, mode: str) -> None:
    """A proxy that speaks for itself, or does not know for whom, is served as who it is."""
    seen = Seen()
    async with behind(seen, mode) as server, connect(where(server)) as proxy:
        await proxy.send_all(header)
        await assert_echoes(proxy)
        (conn,) = seen.served
        assert conn.peer_address == conn.proxy_address == proxy.socket.getsockname()
        assert conn.proxy_header is not None
        assert (conn.proxy_header.command == "LOCAL") == (header is LOCAL)


async def test_a_connection_without() -> None:
    """No header is expected where none was asked for, and there is none to see."""
    seen = Seen()
    async with serving(local(seen.coroutine)) as address, connect(address) as client:
        await assert_echoes(client, LINE)
        (conn,) = seen.served
        assert conn.proxy_header is conn.proxy_address is None
        assert conn.peer_address == client.socket.getsockname()


async def test_serve_tcp() -> None:
    """The option is one of `serve_tcp`'s, too."""
    seen = Seen()
    async with trio.open_nursery() as nursery:

        async def serve(*, task_status: Any) -> None:
            await serve_tcp(
                seen.coroutine,
                0,
                host="127.0.0.1",
                proxy_protocol=TRUSTING,
                task_status=task_status,
            )

        (acceptor,) = await nursery.start(serve)
        async with connect(acceptor.address) as proxy:
            await proxy.send_all(BLOCK)
            await assert_echoes(proxy)
        nursery.cancel_scope.cancel()
    assert seen.peers == [CLIENT]


# -- fail closed


@either_mode
@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(20),
        b"PROXY TCP4 192.0.2.1 198.51.100.2 056324 443\r\nhello",
        b"PROXY UNKNOWN " + b"x" * 200 + b"\r\n",
        BLOCK[:12] + b"\x21\x11\xff\xff" + bytes(40),
        BLOCK[:-1] + b"!hello",
        bytes(1000),
    ],
    ids=["http", "tls", "zero", "long", "huge", "checksum", "null"],
)
async def test_garbage(data: bytes, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """O: it ends that connection, with one line in the log; nobody is served without a header."""
    seen = Seen()
    async with (
        behind(seen, mode) as server,
        connect(where(server)) as neighbour,
        connect(where(server)) as proxy,
    ):
        await neighbour.send_all(BLOCK)
        await assert_echoes(neighbour)
        await proxy.send_all(data)
        assert await rest_of(proxy) == b""
        await assert_echoes(neighbour)
        assert closed(server) == {CloseReason.HANDSHAKE_FAILED: 1}
        assert seen.peers == [CLIENT]
    (record,) = (r for r in caplog.records if r.levelno >= logging.INFO)
    assert "PROXY" in record.getMessage()
    assert record.exc_info is None


@either_mode
async def test_an_untrusted_source(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """A header that others could forge is not read; and without one nobody is served either."""
    seen = Seen()
    async with behind(seen, mode) as server:
        async with connect(where(server), source="127.0.0.2") as forger:
            # It need not say anything.
            assert await rest_of(forger) == b""
        async with connect(where(server), source="127.0.0.2") as forger:
            await forger.send_all(BLOCK + b"hello")
            assert await rest_of(forger) == b""
        assert closed(server) == {CloseReason.HANDSHAKE_FAILED: 2}
        assert server.statistics().bytes_received == 0
    assert not seen.served
    assert caplog.text.count("is not trusted to send PROXY headers") == 2


@either_mode
@pytest.mark.parametrize("header", [LINE, BLOCK, b""], ids=["1", "2", "silence"])
async def test_a_slow_header(header: bytes, mode: str, autojump_clock: MockClock) -> None:
    """D: however steadily it drips, it has `Timeouts.handshake` seconds in all."""
    seen = Seen()
    async with behind(seen, mode) as server, connect(where(server)) as proxy:

        async def drip() -> None:
            with suppress(trio.BrokenResourceError):
                for at in range(len(header)):
                    await proxy.send_all(header[at : at + 1])
                    await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            # A drop that comes too late is answered with a reset.
            with suppress(trio.BrokenResourceError):
                assert await proxy.receive_some() == b""
            nursery.cancel_scope.cancel()
        assert trio.current_time() == pytest.approx(10, abs=0.1)
        await until(lambda: not server.connections)
        assert closed(server) == {CloseReason.HANDSHAKE_FAILED: 1}
    assert not seen.served


async def test_the_header_is_not_the_first_byte(autojump_clock: MockClock) -> None:
    """D: the client's own first byte is what `first_byte` waits for."""
    seen = Seen()
    timeouts = Timeouts(first_byte=5)
    async with behind(seen, timeouts=timeouts) as server, connect(where(server)) as proxy:
        await trio.sleep(3)
        await proxy.send_all(BLOCK)
        assert await proxy.receive_some() == b""
        assert trio.current_time() == pytest.approx(8, abs=0.2)
        await until(lambda: not server.connections)
        assert closed(server) == {CloseReason.FIRST_BYTE_TIMEOUT: 1}


@either_mode
async def test_a_check_that_only_connects(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """Health checks come all the time, and are no warning."""
    seen = Seen()
    async with behind(seen, mode) as server:
        await connect(where(server)).aclose()
        await until(lambda: server.statistics().opened == 1 and not server.connections)
        assert closed(server) == {CloseReason.PEER_EOF: 1}
        checker = connect(where(server))
        await until(lambda: len(server.connections) == 1)
        reset(checker.socket)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await until(lambda: not server.connections)
    assert not [r for r in caplog.records if r.levelno >= logging.INFO]
    assert not seen.served


@either_mode
@either_version
async def test_eof_inside(header: bytes, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """Half a header is none."""
    seen = Seen()
    async with behind(seen, mode) as server, connect(where(server)) as proxy:
        await proxy.send_all(header[:-1])
        await proxy.send_eof()
        assert await rest_of(proxy) == b""
        assert closed(server) == {CloseReason.HANDSHAKE_FAILED: 1}
    assert not seen.served
    assert f"closed after {len(header) - 1} bytes" in caplog.text


async def test_versions_and_the_cap(caplog: pytest.LogCaptureFixture) -> None:
    """What the options exclude is refused."""
    for options, header in (
        (ProxyProtocol(trusted="127.0.0.0/8", versions={2}), LINE),
        (ProxyProtocol(trusted="127.0.0.0/8", versions=[1]), BLOCK),
        (
            ProxyProtocol(trusted="any", max_header=107),
            encode_proxy_header(2, CLIENT, ENTRY, tlvs={0xE0: bytes(100)}),
        ),
    ):
        seen = Seen()
        async with behind(seen, options=options) as server, connect(where(server)) as proxy:
            await proxy.send_all(header)
            assert await rest_of(proxy) == b""
        assert not seen.served
    assert caplog.text.count("of version 2") == caplog.text.count("of version 1") == 1


# -- limits


@either_mode
async def test_limits_are_the_clients(mode: str) -> None:
    """C, O: a hundred clients of one proxy are a hundred peers, and each has its own share."""
    seen = Seen()
    limits = Limits(per_peer=1)
    async with (
        behind(seen, mode, limits=limits) as server,
        clients(where(server), 100) as proxies,
    ):
        for n, proxy in enumerate(proxies):
            await proxy.send_all(header_of(n))
        for proxy in proxies:
            await assert_echoes(proxy)
        async with connect(where(server)) as one_more:
            await one_more.send_all(header_of(7) + b"hello")
            assert await rest_of(one_more) == b""
        assert server.statistics().rejected == {"per_peer": 1}
        assert closed(server) == {CloseReason.HANDSHAKE_FAILED: 1}
        await proxies.pop(7).aclose()
        await until(lambda: len(server.connections) == 99)
        async with connect(where(server)) as again:
            await again.send_all(header_of(7))
            await assert_echoes(again)
        for proxy in proxies:
            await proxy.aclose()
        await until(lambda: not server.connections)
        assert not server._limiter._peers
        assert server._limiter._permits == 0


async def test_limits_leave_the_proxys_own_alone() -> None:
    """Health checks are nobody's share, nor is who has not said yet for whom it is."""
    seen = Seen()
    async with behind(seen, limits=Limits(per_peer=1)) as server:
        async with clients(where(server), 3), clients(where(server), 3) as checks:
            for check in checks:
                await check.send_all(LOCAL)
                await assert_echoes(check)
            assert len(server.connections) == 6
        await until(lambda: not server.connections)
        assert not server.statistics().rejected
        assert not server._limiter._peers


async def test_all_connections_count() -> None:
    """C: the total counts those whose header has not come, too."""
    seen = Seen()
    limits = Limits(connections=1, when_full="reject")
    async with behind(seen, limits=limits) as server, connect(where(server)):
        await until(lambda: len(server.connections) == 1)
        async with connect(where(server)) as second:
            assert await rest_of(second) == b""
        assert server.statistics().rejected == {"connections": 1}


async def test_a_header_that_a_handler_reads() -> None:
    """C: then the server has counted the proxy, and goes by that to the end."""
    seen: list[SocketAddress] = []

    async def handler(conn: TcpConnection) -> None:
        await receive_proxy_header(conn, TRUSTING)
        seen.append(conn.peer_address)
        async for chunk in conn:
            await conn.send_all(chunk)

    server = local(handler, limits=Limits(per_peer=1))
    async with no_leaks(), serving(server) as address:
        for _ in range(2):
            async with connect(address) as proxy:
                await proxy.send_all(BLOCK)
                await assert_echoes(proxy)
                async with connect(address) as second:
                    assert await rest_of(second) == b""
            await until(lambda: not server.connections)
        assert not server._limiter._peers
    assert seen == [CLIENT, CLIENT]


# -- by hand


async def test_by_hand() -> None:
    """Any new connection can be asked for its header, once."""
    conn, proxy = await tcp_pair()
    async with conn, proxy:
        source = conn.peer_address
        proxy.send(BLOCK + b"hello")
        header = await receive_proxy_header(conn, TRUSTING)
        assert header is conn.proxy_header
        assert (conn.peer_address, conn.proxy_address) == (CLIENT, source)
        assert await conn.receive_some() == b"hello"
        with pytest.raises(RuntimeError, match="already"):
            conn.set_proxy_header(header)


async def test_by_hand_refused() -> None:
    """The errors are typed, and nothing of a bad header is believed."""
    conn, proxy = await tcp_pair()
    async with conn, proxy:
        source = conn.peer_address
        with pytest.raises(ProxyProtocolError, match="not trusted"):
            await receive_proxy_header(conn, ProxyProtocol(trusted="10.0.0.0/8"))
        proxy.send(b"hello, hello, hello")
        with pytest.raises(ProxyProtocolError, match="hello"):
            await receive_proxy_header(conn, TRUSTING)
        assert conn.proxy_header is None
        assert conn.peer_address == source


async def test_cancelled() -> None:
    """Cancelled at any checkpoint, it has believed nothing."""
    turns = 0
    while True:
        conn, proxy = await tcp_pair()
        async with conn, proxy:
            proxy.send(LINE)
            cancelled = await cancelled_after(
                turns, lambda c=conn: receive_proxy_header(c, TRUSTING)
            )  # type: ignore[misc]
            assert (conn.proxy_header is None) == cancelled
        if not cancelled:
            break
        turns += 1
    assert turns > 2


# -- Unix sockets


async def test_unix_sockets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They have no address to trust, so that is said; whoever may use the file is believed."""
    for options, trusted in (
        (ProxyProtocol(trusted=(), unix=True), True),
        (ProxyProtocol(trusted="any"), True),
        (ProxyProtocol(trusted=["0.0.0.0/0", "::/0"]), False),
    ):
        seen = Seen()
        path = tmp_path / "socket"
        acceptor = await open_unix_acceptor(path)
        server = TcpServer(seen.coroutine, listeners=[acceptor], proxy_protocol=options)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            async with await trio.open_unix_socket(path) as proxy:
                if trusted:
                    await proxy.send_all(BLOCK)
                    await assert_echoes(proxy)
                    assert seen.served[0].proxy_address == ""
                else:
                    assert await rest_of(proxy) == b""
            server.close()
        assert seen.peers == ([CLIENT] if trusted else [])


# -- options


@pytest.mark.parametrize(
    ("trusted", "inside", "outside"),
    [
        (["10.0.0.0/8"], ["10.1.2.3", "::ffff:10.1.2.3"], ["11.0.0.1", "::1", "::10.0.0.1"]),
        ("192.0.2.7", ["192.0.2.7"], ["192.0.2.8"]),
        (("fd00::/8", "::1"), ["fd12::1", "fd12::1%eth0", "::1"], ["fe80::1", "127.0.0.1"]),
        (["::ffff:10.0.0.0/104"], ["10.1.2.3", "::ffff:10.1.2.3"], ["11.0.0.1"]),
        (["::/0"], ["::1", "2001:db8::1"], ["127.0.0.1", "::ffff:127.0.0.1"]),
        (ipaddress.ip_network("10.0.0.0/8"), ["10.0.0.1"], ["11.0.0.1"]),
        (iter([ipaddress.ip_network("::1")]), ["::1"], ["::2"]),
        ("any", ["10.0.0.1", "::1"], []),
    ],
)
def test_trusts(trusted: Any, inside: list[str], outside: list[str]) -> None:
    """Networks of both families, and an IPv4 address inside IPv6 is an IPv4 address."""

    def address(host: str) -> SocketAddress:
        return (host, 1, 0, 0) if ":" in host else (host, 1)

    options = ProxyProtocol(trusted=trusted)
    assert all(options.trusts(address(host)) for host in inside)
    assert not any(options.trusts(address(host)) for host in outside)
    assert options.trusts("/run/proxy") == (trusted == "any")
    assert hash(options) == hash(ProxyProtocol(trusted=options.trusted))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, TypeError, "trusted"),
        ({"trusted": None}, TypeError, '"any"'),
        ({"trusted": []}, ValueError, "unix=True"),
        ({"trusted": [3232235777]}, TypeError, "3232235777"),
        ({"trusted": ["10.0.0.1/8"]}, ValueError, "host bits"),
        ({"trusted": ["localhost"]}, ValueError, "localhost"),
        ({"trusted": ["any"]}, ValueError, "any"),
        ({"trusted": "any", "unix": 1}, TypeError, "bool"),
        ({"trusted": "any", "versions": ()}, ValueError, "versions"),
        ({"trusted": "any", "versions": 2}, ValueError, "versions"),
        ({"trusted": "any", "versions": (1, 3)}, ValueError, "versions"),
        ({"trusted": "any", "max_header": 106}, ValueError, "107"),
        ({"trusted": "any", "max_header": 65552}, ValueError, "65551"),
        ({"trusted": "any", "max_header": None}, TypeError, "None"),
    ],
)
def test_options_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    """What cannot be meant is refused at once, and the message says what to pass."""
    with pytest.raises(error, match=text):
        ProxyProtocol(**options)


async def test_the_servers_option() -> None:
    """True is no list of networks."""
    options: Any = True
    with pytest.raises(TypeError, match="ProxyProtocol"):
        TcpServer(Seen().coroutine, 0, proxy_protocol=options)


# -- sending


def forwarded(conn: TcpConnection) -> ProxyHeader:
    """What a proxy says: for each connection something else."""
    return ProxyHeader(CLIENT, conn.peer_address, version=1)


Sent = Callable[[TcpConnection, tuple[str, int]], ProxyHeader]
OWN: dict[int, Sent] = {
    version: lambda conn, to, version=version: ProxyHeader(conn.local_address, to, version=version)  # type: ignore[misc]
    for version in (1, 2)
}


@pytest.mark.parametrize(
    ("what", "header"),
    [
        (1, OWN[1]),
        (2, OWN[2]),
        (ProxyHeader(CLIENT, ENTRY), lambda conn, to: ProxyHeader(CLIENT, ENTRY)),
        (forwarded, lambda conn, to: ProxyHeader(CLIENT, to, version=1)),
        (ProxyHeader(command="LOCAL"), lambda conn, to: ProxyHeader(command="LOCAL")),
    ],
    ids=["1", "2", "header", "function", "local"],
)
async def test_a_client_begins_with_it(what: Any, header: Sent) -> None:
    """Each connection begins with a header, before whatever its user sends, and once."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    to = listener.socket.getsockname()

    async def handler(conn: TcpConnection) -> None:
        await conn.send_all(b"hello" + repr(header(conn, to)).encode())
        await conn.send_eof()
        await conn.wait_eof()

    client = TcpClient(*to, handler, proxy_protocol=what, backoff=[0.0] * 9)
    async with listener, client:
        for _ in range(2):
            stream = await accepted(listener)
            got = await everything(stream)
            data, _, expected = got.partition(b"hello")
            assert expected
            parsed: list[ProxyHeader] = []
            left, right = await tcp_pair()
            async with left, right:
                left.send(data)
                parsed.append(await receive_proxy_header(right, ProxyProtocol(trusted="any")))
            assert repr(parsed[0]).encode() == expected
            await stream.aclose()


async def test_one_connection_begins_with_it() -> None:
    """`open_tcp_connection` takes the option, too: a proxy connects so to its backend."""
    seen = Seen()
    async with behind(seen) as server:
        conn = await open_tcp_connection(*where(server), proxy_protocol=ProxyHeader(CLIENT, ENTRY))
        async with conn:
            conn.send(b"hello")
            assert await conn.receive_some() == b"hello"
    assert seen.peers == [CLIENT]


async def test_through_two_proxies() -> None:
    """A header can be sent on as it came."""
    seen = Seen()
    async with behind(seen) as server:

        async def forward(conn: TcpConnection) -> None:
            header = conn.proxy_header
            async with await open_tcp_connection(*where(server), proxy_protocol=header) as onward:
                await onward.send_all(await conn.receive_some())
                await conn.send_all(await onward.receive_some())

        async with (
            serving(local(forward, proxy_protocol=TRUSTING)) as front,
            connect(front) as proxy,
        ):
            await proxy.send_all(BLOCK)
            await assert_echoes(proxy)
        (conn,) = seen.served
        assert conn.peer_address == CLIENT
        assert conn.proxy_header is not None
        assert conn.proxy_header.encode() == BLOCK


@pytest.mark.parametrize("what", [0, 3, True, "1", b"PROXY"])
def test_what_cannot_be_sent(what: Any) -> None:
    """What is none is refused at once."""
    with pytest.raises(TypeError, match="proxy_protocol"):
        TcpClient("127.0.0.1", 1, proxy_protocol=what)


async def test_an_async_function_is_refused() -> None:
    """As everywhere where it would never be awaited."""

    async def header(conn: TcpConnection) -> ProxyHeader:
        raise NotImplementedError

    what: Any = header
    with pytest.raises(TypeError, match="plain function"):
        await open_tcp_connection("127.0.0.1", 1, proxy_protocol=what)


def raises(conn: TcpConnection) -> ProxyHeader:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("what", "error"), [(raises, ZeroDivisionError), (lambda conn: b"PROXY", TypeError)]
)
async def test_a_function_that_fails(what: Any, error: type[Exception]) -> None:
    """F: its error is its user's, the connection is closed, and nothing has been sent."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    to = listener.socket.getsockname()
    client = TcpClient(*to, Seen().coroutine, proxy_protocol=what)
    ways: list[Callable[[], Awaitable[object]]] = [
        client.run,
        lambda: open_tcp_connection(*to, proxy_protocol=what),
    ]
    async with listener:
        for way in ways:
            async with no_leaks():
                with pytest.raises(error):
                    await way()
                stream = await accepted(listener)
                assert await everything(stream) == b""
                await stream.aclose()


async def test_a_peer_that_has_gone() -> None:
    """A server that resets at once is met by whoever uses the connection."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    to = listener.socket.getsockname()
    met = trio.Event()

    async def handler(conn: TcpConnection) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await conn.receive_some()
        met.set()
        client.stop()

    def gone(conn: TcpConnection) -> ProxyHeader:
        # Taken from the backlog, and reset, before the header is sent.
        sock, _ = plain.accept()
        reset(sock)
        return ProxyHeader(CLIENT, ENTRY)

    client = TcpClient(*to, handler, proxy_protocol=gone)
    plain = socket.socket(fileno=socket.dup(listener.socket.fileno()))
    with plain:
        async with listener:
            with trio.fail_after(10):
                await client.run()
    assert met.is_set()


@pytest.mark.parametrize("what", [1, 2, lambda conn: ProxyHeader(CLIENT, conn.peer_address)])
async def test_a_peer_that_went_before_all_else(what: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has reset before we could ask its address is met like any other reset."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    connect = connecting.connection_on

    def late(stream: trio.SocketStream, **options: Any) -> TcpConnection:
        sock, _ = plain.accept()
        reset(sock)
        return connect(stream, **options)

    monkeypatch.setattr(connecting, "connection_on", late)
    plain = socket.socket(fileno=socket.dup(listener.socket.fileno()))
    with plain:
        async with listener, no_leaks():
            to = listener.socket.getsockname()
            conn = await open_tcp_connection(*to, proxy_protocol=what)
            assert conn.peer_address == ""
            with pytest.raises(trio.BrokenResourceError):
                await conn.receive_some()
            await conn.aclose()


# -- and TLS


async def test_a_peer_that_has_gone_before_tls() -> None:
    """A server that resets before the header is sent has failed an attempt, and is tried again."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    to = listener.socket.getsockname()

    def gone(conn: TcpConnection) -> ProxyHeader:
        # Taken from the backlog, and reset, before the header is sent.
        sock, _ = plain.accept()
        reset(sock)
        return ProxyHeader(CLIENT, ENTRY)

    plain = socket.socket(fileno=socket.dup(listener.socket.fileno()))
    with plain:
        async with listener, no_leaks():
            client = TcpClient(
                *to,
                Seen().coroutine,
                proxy_protocol=gone,
                ssl_context=ssl.create_default_context(),
                max_attempts=2,
                backoff=[0.001],
            )
            with trio.fail_after(10), pytest.raises(ConnectError) as caught:
                await client.run()
    assert [type(attempt.error) for attempt in caught.value.attempts] == [ConnectionResetError] * 2


@either_mode
async def test_before_tls(mode: str) -> None:
    """The header goes before TLS, and TLS finds all that follows it, though it comes at once."""
    authority = trustme.CA()
    theirs, ours = ssl.create_default_context(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.configure_trust(theirs)
    authority.issue_cert("localhost").configure_cert(ours)
    seen = Seen()
    async with behind(seen, mode, ssl_context=ours) as server:
        client = TcpClient(
            *where(server),
            ssl_context=theirs,
            server_hostname="localhost",
            proxy_protocol=ProxyHeader(CLIENT, ENTRY),
        )
        async with client:
            conn = await client.wait_connected()
            conn.send(b"hello")
            assert await conn.receive_some() == b"hello"
        # A header that is cut, and a ClientHello right behind it.
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        with pytest.raises(ssl.SSLWantReadError):
            theirs.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
        data = BLOCK + outgoing.read()
        for at in (1, len(BLOCK) - 1, len(BLOCK), len(BLOCK) + 1, len(data)):
            async with connect(where(server)) as proxy:
                await proxy.send_all(data[:at])
                await trio.testing.wait_all_tasks_blocked()
                await proxy.send_all(data[at:])
                # A ServerHello.
                assert (await proxy.receive_some())[:1] == b"\x16"
    (served,) = seen.served
    assert served.peer_address == CLIENT
    assert served.tls is not None
