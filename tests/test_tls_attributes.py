"""`TcpConnection.start_tls`: how TLS begins, in the middle of a connection too, or fails to."""

from __future__ import annotations

import gc
import ssl
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.conftest import (
    Pair,
    cancelled_after,
    echo,
    everything,
    fill,
    no_leaks,
    reset,
    tcp_pair,
    tcp_streams,
    until,
)
from tests.tls import (
    NAME,
    authority,
    client_context,
    server_context,
    shake_hands,
    tls_pair,
    versions,
    write_pem,
)
from trioreactor import (
    Buffer,
    CloseReason,
    ConnectionState,
    FramedChannel,
    HandshakeFailed,
    LineCodec,
    ProtocolError,
    TcpConnection,
    Timeouts,
    TlsInfo,
)

settled = trio.testing.wait_all_tasks_blocked


def serve(conn: TcpConnection, context: ssl.SSLContext | None = None) -> Awaitable[None]:
    return conn.start_tls(context or server_context(), server_side=True)


def ask(conn: TcpConnection, **options: Any) -> Awaitable[None]:
    options = {"server_hostname": NAME} | options
    return conn.start_tls(client_context(), server_side=False, **options)


@versions
async def test_after_a_while_in_the_open(
    make_pair: Callable[..., Awaitable[Pair]], version: ssl.TLSVersion
) -> None:
    """STARTTLS: both talk, begin, and talk on; everything counts in bytes of their own."""
    async with no_leaks():
        server, client = await make_pair()
        await client.send_all(b"STARTTLS\n")
        assert await server.receive_some() == b"STARTTLS\n"
        assert server.tls is None
        await server.send_all(b"go on\n")
        assert await client.receive_some() == b"go on\n"
        await shake_hands(server, client, servers=server_context(version))
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def serving() -> None:
                await echo(server)
                await server.aclose()

            await client.send_all(bytes(100_000))
            await client.send_eof()
            assert len(await everything(client)) == 100_000
            await client.aclose()
        for conn, greeting in (client, 9), (server, 6):
            assert conn.statistics().bytes_sent == 100_000 + greeting
            assert conn.close_reason is not None


async def test_what_is_known() -> None:
    """`tls` tells what was agreed on and who the peer is, and goes on telling after the close."""
    servers, clients = server_context(), client_context()
    servers.set_alpn_protocols(["two", "one"])
    clients.set_alpn_protocols(["one", "two"])
    server, client = await tcp_pair()
    await shake_hands(server, client, servers=servers, clients=clients)
    await server.aclose()
    await client.aclose()
    for conn in server, client:
        tls = conn.tls
        assert isinstance(tls, TlsInfo)
        assert tls.version == "TLSv1.3"
        assert tls.cipher is not None
        assert tls.alpn_protocol == "two"
        assert tls.server_hostname == NAME
        assert not tls.https_compatible
        assert not tls.session_reused
        assert "TLSv1.3" in repr(tls)
    assert client.tls is not None
    assert server.tls is not None
    assert client.tls.peer_certificate is not None
    assert client.tls.peer_certificate["subjectAltName"] == (("DNS", NAME),)
    assert client.tls.peer_certificate_der is not None
    assert server.tls.peer_certificate is None
    assert server.tls.peer_certificate_der is None


async def test_a_client_without_a_name() -> None:
    """One that says no name is served, and has asked for none."""
    clients = client_context()
    clients.check_hostname = False
    server, client = await tcp_pair()
    await shake_hands(server, client, clients=clients, server_hostname=None)
    assert server.tls is not None
    assert server.tls.server_hostname is None
    server.force_close()
    client.force_close()


async def test_a_context_that_chooses_by_name() -> None:
    """The user's own callback for SNI is still asked, and its choice of a certificate holds."""
    other = server_context(name="other.example")
    servers = server_context()
    asked: list[str] = []

    def choose(tls: ssl.SSLObject, name: str, context: ssl.SSLContext) -> None:
        asked.append(name)
        tls.context = other

    servers.sni_callback = choose
    for _ in range(2):
        server, client = await tcp_pair()
        await shake_hands(server, client, servers=servers, server_hostname="other.example")
        assert server.tls is not None
        assert server.tls.server_hostname == "other.example"
        server.force_close()
        client.force_close()
    assert asked == ["other.example"] * 2


async def test_a_clients_certificate(tmp_path: Path) -> None:
    """The server knows a client that has one, and refuses one that has none."""
    own, _ = write_pem(tmp_path, "client.example")
    clients = client_context()
    clients.load_cert_chain(own)
    server, client = await tcp_pair()
    await shake_hands(server, client, servers=server_context(verify=True), clients=clients)
    assert server.tls is not None
    assert server.tls.peer_certificate is not None
    assert server.tls.peer_certificate["subjectAltName"] == (("DNS", "client.example"),)
    server.force_close()
    client.force_close()

    server, client = await tcp_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, client)
        with pytest.raises(HandshakeFailed) as caught:
            await serve(server, server_context(verify=True))
    assert isinstance(caught.value.__cause__, ssl.SSLError)
    # In TLS 1.3 the client has been done before.
    with pytest.raises(trio.BrokenResourceError):
        await client.receive_some()


@versions
async def test_a_session_is_resumed(version: ssl.TLSVersion) -> None:
    """What `tls.session` gave saves a later handshake its certificates."""
    servers, clients = server_context(version), client_context()
    session = None
    for reused in False, True:
        server, client = await tcp_pair()
        await shake_hands(server, client, servers=servers, clients=clients, session=session)
        # TLS 1.3 sends it after the handshake.
        await server.send_all(b"x")
        await client.receive_some()
        assert client.tls is not None
        assert server.tls is not None
        assert client.tls.session_reused == server.tls.session_reused == reused
        await client.aclose()
        await server.aclose()
        session = client.tls.session


async def test_what_is_queued_goes_first() -> None:
    """In the open, as it was sent."""
    server, client = await tcp_pair()
    size = await fill(server)
    assert server.buffered
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, server)
        await settled()
        with pytest.raises(trio.BusyResourceError):
            server.send(b"behind it, in the open")
        got = 0
        while got < size:
            got += len(await client.receive_some(size - got))
        await ask(client)
    await server.send_all(b"in TLS")
    assert await client.receive_some() == b"in TLS"
    server.force_close()
    client.force_close()


async def leave_bytes(conn: TcpConnection, peer: TcpConnection, data: bytes) -> None:
    """Have *conn* read *data* from *peer*, and consume nothing of it."""
    peer.send(data)
    async with trio.open_nursery() as nursery:

        def on_message(_conn: TcpConnection, _buffer: Buffer) -> None:
            nursery.cancel_scope.cancel()

        nursery.start_soon(conn.dispatch, on_message)


@pytest.mark.parametrize("server_side", [False, True])
async def test_bytes_in_front_of_it_are_refused(server_side: bool) -> None:
    """FAULTS 53. What was read in the open and not consumed ends the connection, on either side."""
    conn, peer = await tcp_pair()
    await leave_bytes(conn, peer, b"RCPT TO:<everybody>\n")
    with pytest.raises(ProtocolError, match="20 bytes"):
        await (serve(conn) if server_side else ask(conn))
    assert conn.close_reason is CloseReason.PROTOCOL_ERROR
    with pytest.raises(trio.ClosedResourceError):
        await conn.receive_some()
    peer.force_close()


async def test_messages_in_front_of_it_are_refused() -> None:
    """FAULTS 53. The same of a channel, whose input is its own: whole messages and half ones."""
    for extra in b"more\n", b"mo":
        conn, peer = await tcp_pair()
        channel = FramedChannel(conn, LineCodec())
        await peer.send_all(b"STARTTLS\n" + extra)
        assert await channel.receive() == "STARTTLS"
        with pytest.raises(ProtocolError):
            await channel.start_tls(server_context(), server_side=True)
        assert conn.close_reason is CloseReason.PROTOCOL_ERROR
        peer.force_close()


async def test_a_channel_begins_it() -> None:
    """Messages in the open, and then in TLS."""
    server, client = (FramedChannel(conn, LineCodec()) for conn in await tcp_pair())
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def serving() -> None:
            assert await server.receive() == "STARTTLS"
            await server.send("yes")
            await server.start_tls(server_context(), server_side=True)
            async for line in server:
                await server.send(line.upper())
            await server.aclose()

        await client.send("STARTTLS")
        assert await client.receive() == "yes"
        await client.start_tls(client_context(), server_side=False, server_hostname=NAME)
        for _ in range(3):
            await client.send("hello")
        assert [await client.receive() for _ in range(3)] == ["HELLO"] * 3
        assert client.conn.tls is not None
        await client.aclose()


async def test_plain_bytes_in_the_kernel() -> None:
    """FAULTS 53. They are taken for the peer's first record, and are none."""
    conn, peer = await tcp_pair()
    await peer.send_all(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(HandshakeFailed) as caught:
        await serve(conn)
    assert isinstance(caught.value.__cause__, ssl.SSLError)
    assert conn.close_reason is CloseReason.HANDSHAKE_FAILED
    assert conn.broken
    peer.force_close()


async def test_a_client_that_is_early() -> None:
    """Its first record may wait in the kernel."""
    server, client = await tcp_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, client)
        await until(server.has_unread)
        await serve(server)
    server.force_close()
    client.force_close()


async def test_meanwhile() -> None:
    """Nobody else reads or sends in a handshake; who waits for room goes on after it."""
    server, client = await tcp_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, server)
        await settled()
        with pytest.raises(trio.BusyResourceError):
            server.send(b"x")
        with pytest.raises(trio.BusyResourceError):
            await server.send_all(b"x")
        with pytest.raises(trio.BusyResourceError):
            await server.receive_some()
        with pytest.raises(trio.BusyResourceError):
            await server.dispatch(lambda _conn, _buffer: None)
        assert server.tls is None
        assert not server.takes(1)
        assert not server.has_unread()
        nursery.start_soon(server.wait_uncongested, 1)
        await ask(client)
    server.send(b"x")
    assert await client.receive_some() == b"x"
    server.force_close()
    client.force_close()


async def test_somebody_reads_or_sends() -> None:
    """Then it does not begin, and nothing has changed."""
    server, client = await tcp_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.receive_some)
        await settled()
        with pytest.raises(trio.BusyResourceError):
            await serve(server)
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        await fill(server)
        nursery.start_soon(server.wait_send_all_might_not_block)
        await settled()
        with pytest.raises(trio.BusyResourceError):
            await serve(server)
        nursery.cancel_scope.cancel()
    client.send(b"in the open")
    assert await server.receive_some() == b"in the open"
    server.force_close()
    client.force_close()


async def test_arguments() -> None:
    """What cannot be is refused at once, and nothing has changed."""
    server, client = await tcp_pair()
    wrong: Any = "context"
    with pytest.raises(TypeError, match="SSLContext"):
        await server.start_tls(wrong, server_side=True)
    with pytest.raises(ValueError, match="server_hostname"):
        await client.start_tls(client_context(), server_side=False)
    with pytest.raises(ValueError, match="server"):
        await server.start_tls(server_context(), server_side=True, server_hostname="x")
    await shake_hands(server, client)
    with pytest.raises(RuntimeError, match="already"):
        await serve(server)
    with pytest.raises(RuntimeError, match="TLS"):
        server.detach()
    assert server.state is ConnectionState.CONNECTED
    server.force_close()
    client.force_close()
    with pytest.raises(trio.ClosedResourceError):
        plain, other = await tcp_pair()
        other.force_close()
        plain.force_close()
        await serve(plain)


@pytest.mark.parametrize("drip", [False, True])
async def test_a_handshake_that_stalls(autojump_clock: MockClock, drip: bool) -> None:
    """FAULTS 51. `Timeouts.handshake` ends it, also where bytes drip."""
    stream, raw = await tcp_streams()
    conn = TcpConnection(stream, timeouts=Timeouts(handshake=5))
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        if drip:

            @nursery.start_soon
            async def dripping() -> None:
                # The beginning of a long ClientHello.
                for byte in b"\x16\x03\x01\x20\x00\x01\x00\x1f\xfc\x03\x03" + bytes(100):
                    await trio.sleep(1)
                    await raw.send_all(bytes([byte]))

        with pytest.raises(HandshakeFailed, match="within 5 s") as caught:
            await serve(conn)
        nursery.cancel_scope.cancel()
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert trio.current_time() - start == pytest.approx(5)
    assert conn.close_reason is CloseReason.HANDSHAKE_FAILED
    await raw.aclose()


async def test_queued_data_that_nobody_takes(autojump_clock: MockClock) -> None:
    """The deadline counts from the beginning, flushing included."""
    conn, peer = await tcp_pair(timeouts=Timeouts(handshake=5))
    await fill(conn)
    with pytest.raises(HandshakeFailed, match="within 5 s"):
        await serve(conn)
    peer.force_close()


async def test_no_deadline(autojump_clock: MockClock) -> None:
    """None is off."""
    conn, peer = await tcp_pair(timeouts=Timeouts(handshake=None))
    with trio.move_on_after(3600) as scope:
        await serve(conn)
    assert scope.cancelled_caught
    peer.force_close()


async def test_cancelled() -> None:
    """At any checkpoint: it leaves no leak, and no connection that is neither in nor out."""
    turns = 0
    while True:
        async with no_leaks():
            server, client = await tcp_pair()
            done = False
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def asking(client: TcpConnection = client) -> None:
                    with suppress(trio.BrokenResourceError):
                        await ask(client)

                done = not await cancelled_after(turns, partial(serve, server))
                if done:
                    assert server.tls is not None
                elif turns > 1:
                    assert server.close_reason is CloseReason.CANCELLED
                    with pytest.raises(trio.ClosedResourceError):
                        server.send(b"x")
                server.force_close()
            client.force_close()
        if done:
            break
        turns += 1
    assert turns > 2


async def test_cancelled_before_it_begins() -> None:
    """Then nothing has changed."""
    server, client = await tcp_pair()
    with trio.CancelScope() as scope:
        scope.cancel()
        await serve(server)
    assert server.state is ConnectionState.CONNECTED
    server.send(b"x")
    server.force_close()
    client.force_close()


@pytest.mark.parametrize("how", [TcpConnection.aclose, TcpConnection.force_close])
async def test_closed_meanwhile(how: Callable[[TcpConnection], Any]) -> None:
    """By us: it says so. The reason is that of the close."""
    conn, peer = await tcp_pair()

    async def close() -> None:
        await settled()
        closing = how(conn)
        if closing is not None:
            await closing

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        with pytest.raises(trio.ClosedResourceError):
            await serve(conn)
    assert conn.close_reason in (CloseReason.LOCAL_CLOSE, CloseReason.FORCED)
    peer.force_close()


@pytest.mark.parametrize("how", [reset, lambda sock: sock.close()], ids=["reset", "fin"])
async def test_the_peer_goes_meanwhile(how: Callable[[Any], None]) -> None:
    """A FIN or a reset in the handshake fails it."""
    stream, peer = await tcp_streams()
    conn = TcpConnection(stream)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def go() -> None:
            await settled()
            how(peer.socket)

        with pytest.raises(HandshakeFailed) as caught:
            await serve(conn)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert conn.close_reason is CloseReason.HANDSHAKE_FAILED


async def test_half_closed_meanwhile() -> None:
    """`shutdown` in a handshake holds for what comes after it."""
    server, client = await tcp_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, server)
        await settled()
        server.shutdown()
        await ask(client)
    assert await everything(client) == b""
    client.send(b"answer")
    assert await server.receive_some() == b"answer"
    await client.aclose()
    await server.aclose()


async def test_reading_that_was_stopped() -> None:
    """It stays so for what comes in TLS, and not for the handshake."""
    server, client = await tcp_pair()
    server.stop_reading()
    await shake_hands(server, client)
    assert not server.reading
    client.send(b"x")
    with trio.move_on_after(0.01) as scope:
        await server.receive_some()
    assert scope.cancelled_caught
    server.start_reading()
    assert await server.receive_some() == b"x"
    server.force_close()
    client.force_close()


@versions
async def test_a_certificate_that_is_not_trusted(version: ssl.TLSVersion) -> None:
    """Both sides hear of it: the client why, the server by an alert."""
    for clients, name in (
        (ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), NAME),
        (client_context(), "wrong.example"),
    ):
        server, client = await tcp_pair()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def serving(server: TcpConnection = server) -> None:
                with pytest.raises(HandshakeFailed) as caught:
                    await serve(server, server_context(version))
                assert "alert" in str(caught.value).lower()

            with pytest.raises(HandshakeFailed) as caught:
                await client.start_tls(clients, server_side=False, server_hostname=name)
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
        assert isinstance(caught.value, trio.BrokenResourceError)
        assert client.close_reason is server.close_reason is CloseReason.HANDSHAKE_FAILED


async def test_ended_connections_leave_no_cycles() -> None:
    """An ended connection is freed by its reference counts, also one that was cut."""
    gc.collect()
    gc.disable()
    try:
        server, client = await tls_pair()
        client.send(b"x" * 10)
        await client.aclose()
        assert await everything(server) == b"x" * 10
        await server.aclose()
        refs = [weakref.ref(server), weakref.ref(client)]
        del server, client
        await settled()
        assert [ref() for ref in refs] == [None, None]

        server, client = await tls_pair()
        client.force_close()
        with pytest.raises(trio.BrokenResourceError):
            await everything(server)
        refs = [weakref.ref(server), weakref.ref(client)]
        del server, client
        await settled()
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


def test_contexts_trust_whom_they_should() -> None:
    """The tests' own authority, or nothing above would mean anything."""
    assert authority().cert_pem.bytes().startswith(b"-----BEGIN")
