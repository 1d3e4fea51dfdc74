"""How a client's connections end, as its users meet it: gracefully, though the handler still sends,
and never handed out again."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Awaitable, Callable

import pytest
import trio

from tests.conftest import no_leaks, reset, tcp_pair, until
from tests.servers import unused_port
from trioreactor import (
    CloseReason,
    ConnectError,
    Connector,
    Limits,
    TcpClient,
    TcpConnection,
    TcpServer,
    Timeouts,
    Watermarks,
    open_tcp_connection,
)
from trioreactor.channel import Channel
from trioreactor.poller import Poller

End = Callable[[TcpClient, TcpConnection], Awaitable[object]]

QUEUED = b"x" * 3_000_000


async def by_disconnect(client: TcpClient, conn: TcpConnection) -> None:
    client.disconnect()
    await trio.lowlevel.checkpoint()


async def by_aclose(client: TcpClient, conn: TcpConnection) -> None:
    client.retry = False
    await conn.aclose()


async def by_force_close(client: TcpClient, conn: TcpConnection) -> None:
    client.retry = False
    conn.force_close()
    await trio.lowlevel.checkpoint()


async def by_stop(client: TcpClient, conn: TcpConnection) -> None:
    client.stop()
    await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("end", [by_disconnect, by_aclose, by_force_close, by_stop])
@pytest.mark.parametrize("block", [False, True])
async def test_a_handler_that_sends_on(
    end: End, block: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """However the connection is ended from outside, the send that meets the end is no error of the
    client's, and what was queued before a graceful end arrives whole."""
    caplog.set_level(logging.INFO, "trioreactor")
    received = 0
    full = trio.Event()

    async def slow_reader(conn: TcpConnection) -> None:
        nonlocal received
        await ended.wait()
        async for chunk in conn:
            received += len(chunk)

    async def sender(conn: TcpConnection) -> None:
        conn.send(QUEUED)
        full.set()
        while True:
            await trio.sleep(0.001)
            conn.send(b"")

    ended = trio.Event()
    async with no_leaks(), trio.open_nursery() as nursery:
        server = TcpServer(slow_reader, 0, host="127.0.0.1")
        (acceptor,) = await nursery.start(server.serve)
        client = TcpClient(*acceptor.address, sender)

        async def act() -> None:
            await full.wait()
            conn = await client.wait_connected()
            async with trio.open_nursery() as inner:
                inner.start_soon(end, client, conn)
                ended.set()

        with trio.fail_after(10):
            if block:
                async with client:
                    await act()
                    await until(lambda: client.connection is None)
            else:
                nursery.start_soon(act)
                await client.run()
            await until(lambda: not server.connections)
        server.close()
    graceful = end in (by_disconnect, by_aclose)
    assert received == len(QUEUED) or not graceful
    reasons = {CloseReason.LOCAL_CLOSE, CloseReason.PEER_EOF} if graceful else {CloseReason.FORCED}
    assert set(client.statistics().closed) <= reasons
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def test_a_block_that_only_sends() -> None:
    """A block without a handler that reads nothing gets the next connection, though the server said
    something before it reset: a send that fails is enough."""
    peers: list[TcpConnection] = []
    seen = trio.Event()

    async def banner(conn: TcpConnection) -> None:
        peers.append(conn)
        await conn.send_all(b"busy\n")
        if len(peers) == 1:
            await seen.wait()
            reset(conn.detach()[0].socket)
        else:
            await conn.wait_eof()

    async with trio.open_nursery() as nursery:
        server = TcpServer(banner, 0, host="127.0.0.1")
        (acceptor,) = await nursery.start(server.serve)
        with trio.fail_after(10):
            async with TcpClient(*acceptor.address, backoff=[0.01] * 9) as client:
                first = await client.wait_connected()
                seen.set()
                with pytest.raises(trio.BrokenResourceError):
                    while True:
                        first.send(b"x")
                        await trio.sleep(0.001)
                assert await client.wait_connected() is not first
                assert client.statistics().opened == 2
        server.close()


async def test_a_closed_peer_is_known_behind_unread_input() -> None:
    """`peer_closed` on epoll: the EOF is announced, though input before it is unread."""
    left, right = await tcp_pair()
    async with left, right:
        if not left._read.channel.read_armed:
            pytest.skip("the trio poller hears of nothing that is not asked for")
    async with trio.open_nursery() as nursery:

        async def speak(conn: TcpConnection) -> None:
            await conn.send_all(b"unread")

        server = TcpServer(speak, 0, host="127.0.0.1")
        (acceptor,) = await nursery.start(server.serve)
        with trio.fail_after(10):
            async with TcpClient(*acceptor.address, backoff=[0.01] * 9) as client:
                first = await client.wait_connected()
                await until(lambda: first.peer_closed)
                assert not first.at_eof
                assert await client.wait_connected() is not first
        server.close()


ACTIONS: dict[str, Callable[[TcpClient], object]] = {
    "reset_backoff": lambda client: client.reset_backoff(),
    "retry off": lambda client: setattr(client, "retry", False),
    "stop": lambda client: client.stop(),
    "disconnect": lambda client: client.disconnect(),
}


@pytest.mark.parametrize("first", ACTIONS)
@pytest.mark.parametrize("then", ["stop", "disconnect"])
async def test_two_words_in_one_turn(
    first: str, then: str, autojump_clock: trio.testing.MockClock
) -> None:
    """While it waits in the backoff: whatever has woken it, an end in the same turn ends it, and
    `run` returns."""
    waits = trio.Event()

    async def act() -> None:
        await waits.wait()
        await trio.testing.wait_all_tasks_blocked()
        ACTIONS[first](client)
        ACTIONS[then](client)

    with unused_port() as port, trio.fail_after(100):
        client = TcpClient(
            "127.0.0.1", port, TcpConnection.wait_eof, on_attempt=lambda attempt: waits.set()
        )
        async with no_leaks(), trio.open_nursery() as nursery:
            nursery.start_soon(act)
            await client.run()


@pytest.mark.parametrize("end", ["stop", "disconnect"])
async def test_ended_by_the_last_attempt(end: str) -> None:
    """`on_attempt` may end the client at the attempt after which none follows: `run` returns."""
    with unused_port() as port:
        client = TcpClient(
            "127.0.0.1",
            port,
            TcpConnection.wait_eof,
            max_attempts=1,
            on_attempt=lambda attempt: ACTIONS[end](client),
        )
        await client.run()


async def test_failures_between_short_connections(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """`wait_connected` counts the failures since it was called, and tells of as many, though
    connections that were lost at once came between."""
    with unused_port() as closed, socket.create_server(("127.0.0.1", 0)) as listener:
        places = [("127.0.0.1", closed), listener.getsockname()]

        async def refuse(conn: TcpConnection) -> None:
            conn.force_close()

        client = TcpClient(endpoints=places, handler=refuse)
        async with no_leaks(), client:
            with pytest.raises(ConnectError, match="after 3 attempts") as told:
                await client.wait_connected(3)
            assert len(told.value.attempts) == 3


async def test_those_who_wait_when_a_loop_was_left(autojump_clock: trio.testing.MockClock) -> None:
    """After a `break`, `disconnect` tells them that no connection will come."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = TcpClient(*listener.getsockname())
        async with trio.open_nursery() as nursery:
            async for conn in client:
                async with client.session(conn):
                    pass
                break

            async def wait() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await client.wait_connected()

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            client.disconnect()


async def test_a_backoff_that_ended_begins_anew() -> None:
    """A `connect` that raised because the backoff ended is followed by one that tries again."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connector = Connector(*listener.getsockname(), backoff=[])
        await (await connector.connect()).aclose()
        with pytest.raises(ConnectError, match="no further delay"):
            await connector.connect()
        await (await connector.connect()).aclose()


async def test_a_block_within_its_own_block() -> None:
    """Is refused, also when the connection of the outer one has ended."""
    with socket.create_server(("127.0.0.1", 0)) as listener, trio.fail_after(10):
        client = TcpClient(*listener.getsockname(), retry=False)
        async with no_leaks(), client:
            (await client.wait_connected()).force_close()
            await trio.testing.wait_all_tasks_blocked()
            for use in (client.run(TcpConnection.wait_eof), client.__aenter__()):
                with pytest.raises(trio.BusyResourceError):
                    await use


@pytest.mark.parametrize("asks", [False, True])
async def test_to_ask_ends_nothing(asks: bool) -> None:
    """Whoever waits for a connection takes nothing away from a task that reads the one there is."""
    received = 0
    asked = trio.Event()

    async def give(conn: TcpConnection) -> None:
        await conn.send_all(bytes(100_000))

    async with trio.open_nursery() as nursery:
        server = TcpServer(give, 0, host="127.0.0.1")
        (acceptor,) = await nursery.start(server.serve)
        with trio.fail_after(10):
            async with TcpClient(*acceptor.address, backoff=[0.01] * 9) as client:
                conn = await client.wait_connected()
                received += len(await conn.receive_some(10_000))

                async def ask() -> None:
                    asked.set()
                    await client.wait_connected()

                async with trio.open_nursery() as inner:
                    if asks:
                        inner.start_soon(ask)
                        await asked.wait()
                        await trio.testing.wait_all_tasks_blocked()
                    while received < 100_000:
                        chunk = await conn.receive_some(10_000)
                        assert chunk
                        received += len(chunk)
        server.close()


async def test_what_reset_backoff_is_about(autojump_clock: trio.testing.MockClock) -> None:
    """It is about the connection there is: one that is made later has to prove itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connector = Connector(*listener.getsockname(), backoff=[1, 2, 4])
        connector.reset_backoff()
        begun = []
        for _ in range(3):
            await (await connector.connect()).aclose()
            begun.append(trio.current_time() - sum(begun))
        assert begun == [0, 1, 2]


@pytest.mark.parametrize(
    "options",
    [{"path": ""}, {"path": b"/x"}, {"endpoints": "/x"}, {"local_address": "127.0.0.1%lo"}],
)
def test_addresses_that_cannot_be(options: dict[str, object]) -> None:
    """Are refused where they are written."""
    where: dict[str, object] = {} if "local_address" not in options else {"path": "/x"}
    with pytest.raises((TypeError, ValueError), match="pass"):
        Connector(**where, **options)  # type: ignore[arg-type]


async def test_no_descriptor_beside_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a connection needs beside its socket may be short, the epoll object or room in it: that
    passes, so the client tries again, after the backoff's delay; `open_tcp_connection` says so."""
    shortage = OSError(errno.EMFILE, "Too many open files")
    left = 2

    def refuse(poller: Poller, channel: Channel) -> None:
        nonlocal left
        if left:
            left -= 1
            raise shortage
        register(poller, channel)

    register = Poller.register
    monkeypatch.setattr(Poller, "register", refuse)
    # The kernel connects without anybody's accepting.
    with socket.create_server(("127.0.0.1", 0)) as listener, trio.fail_after(10):
        host, port = listener.getsockname()
        async with TcpClient(host, port, backoff=[0.01, 0.02]) as client:
            await client.wait_connected()
            assert (left, client.statistics().attempts, client.statistics().opened) == (0, 3, 1)
        left = 1
        with pytest.raises(ConnectError, match="Too many open files"):
            await open_tcp_connection(host, port)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"timeouts": 5}, r"TcpClient\(timeouts=5\): pass Timeouts\(\.\.\.\)"),
        ({"watermarks": {}}, r"TcpClient\(watermarks=\{\}\): pass Watermarks"),
        ({"socket_options": {}}, r"\(socket_options=\{\}\): pass SocketOptions"),
        ({"timeout": 3}, "TcpClient has no option timeout"),
    ],
)
def test_options_of_the_wrong_kind(options: dict[str, object], text: str) -> None:
    """They fail where they are written, and the message says what to pass."""
    with pytest.raises(TypeError, match=text):
        TcpClient("localhost", 1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"timeouts": Watermarks()},
        {"watermarks": Limits()},
        {"limits": Timeouts()},
        {"socket_options": Timeouts()},
    ],
)
def test_a_servers_options_of_the_wrong_kind(options: dict[str, object]) -> None:
    """A server checks them, too."""
    (name,) = options
    with pytest.raises(TypeError, match=rf"TcpServer\({name}=.*pass \w+\(\.\.\.\)"):
        TcpServer(TcpConnection.wait_eof, 0, **options)  # type: ignore[arg-type]
