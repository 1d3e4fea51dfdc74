"""Acceptor: taking connections off a listening socket, by itself and for every error of accept."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing

from tests.conftest import cancelled_after, connect, echo, no_leaks, until
from tests.servers import ScriptedListener
from trioreactor import Acceptor, SocketAddress, SocketOptions, TcpServer
from trioreactor.acceptor import DEFAULT_BATCH
from trioreactor.sockets import (
    ACCEPT_DESCRIPTOR_ERRNOS,
    ACCEPT_MEMORY_ERRNOS,
    ACCEPT_PEER_ERRNOS,
)


@asynccontextmanager
async def accepting(
    make: Callable[[], socket.socket] = lambda: socket.create_server(("127.0.0.1", 0)),
) -> AsyncIterator[Acceptor]:
    """An acceptor on loopback, closed at the end, which leaks nothing."""
    async with no_leaks(), Acceptor(make()) as acceptor:
        yield acceptor


def failing(*errnos: int) -> Callable[[], ScriptedListener]:
    """Makes a listening socket whose first calls of accept fail."""
    return lambda: ScriptedListener(errnos)


async def take(acceptor: Acceptor) -> SocketAddress:
    """Accept one and close it. The address of the client."""
    async with await acceptor.accept() as stream:
        address: SocketAddress = stream.socket.getpeername()
        return address


def name_of(number: int) -> str:
    return errno.errorcode[number]


# -- the listener's contract


async def test_accept_gives_connected_streams_in_order() -> None:
    """accept() gives trio's own streams, the longest-waiting client first."""
    async with (
        accepting() as acceptor,
        connect(acceptor.address) as a,
        connect(acceptor.address) as b,
    ):
        for client in (a, b):
            async with await acceptor.accept() as stream:
                assert type(stream) is trio.SocketStream
                assert stream.socket.getpeername() == client.socket.getsockname()
                await client.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
        assert acceptor.statistics().accepted == 2


async def test_accept_waits_for_a_client() -> None:
    """With nobody there accept() waits, and ends when a client comes."""
    async with accepting() as acceptor, trio.open_nursery() as nursery:
        nursery.start_soon(take, acceptor)
        await trio.testing.wait_all_tasks_blocked()
        assert acceptor.statistics().accepted == 0
        async with connect(acceptor.address):
            await until(lambda: acceptor.statistics().accepted == 1)


async def test_waits_again_for_each_client() -> None:
    """Each wait is ended by a new client, however often it has waited before."""
    async with accepting() as acceptor:
        for _ in range(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(take, acceptor)
                await trio.testing.wait_all_tasks_blocked()
                async with connect(acceptor.address):
                    pass


async def test_accept_and_aclose_checkpoint() -> None:
    """Both are checkpoints even when they need not wait."""
    async with accepting() as acceptor, connect(acceptor.address):
        with trio.testing.assert_checkpoints():
            stream = await acceptor.accept()
        await stream.aclose()
        with trio.testing.assert_checkpoints():
            await acceptor.aclose()
        with trio.testing.assert_checkpoints():
            await acceptor.aclose()


async def test_a_second_waiting_task_is_refused() -> None:
    """Two tasks that wait at once: BusyResourceError, and the first is not disturbed."""
    async with accepting() as acceptor, trio.open_nursery() as nursery:
        nursery.start_soon(take, acceptor)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await acceptor.accept()
        async with connect(acceptor.address):
            await until(lambda: acceptor.statistics().accepted == 1)


async def test_closing_wakes_who_waits() -> None:
    """A task in accept() hears of the close at once, with ClosedResourceError."""

    async def wait(acceptor: Acceptor) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await acceptor.accept()

    async with accepting() as acceptor, trio.open_nursery() as nursery:
        nursery.start_soon(wait, acceptor)
        await trio.testing.wait_all_tasks_blocked()
        acceptor.close()


async def test_closed_for_good() -> None:
    """After the close every way in raises ClosedResourceError, and closing again does nothing."""
    closes: list[str] = []
    async with no_leaks():
        acceptor = Acceptor(ScriptedListener(), on_close=lambda: closes.append("closed"))
        async with connect(acceptor.address) as client:
            await take(acceptor)
            acceptor.close()
            acceptor.close()
            await acceptor.aclose()
            with pytest.raises(trio.ClosedResourceError):
                await acceptor.accept()
            with pytest.raises(trio.ClosedResourceError):
                acceptor.accept_nowait()
            with pytest.raises(trio.ClosedResourceError):
                await acceptor.wait_acceptable()
            assert await client.receive_some() == b""
    assert closes == ["closed"]
    assert "closed" in repr(acceptor)


async def test_closing_during_a_pause_wakes_who_waits() -> None:
    """A pause does not delay the news of a close."""

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await acceptor.accept()

    async with (
        accepting(failing(errno.ENOMEM)) as acceptor,
        connect(acceptor.address),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(wait)
        await until(lambda: acceptor.statistics().errors)
        acceptor.close()


def test_can_be_made_and_closed_outside_trio() -> None:
    """Neither making nor closing an unused acceptor needs a trio run."""
    sock = ScriptedListener()
    acceptor = Acceptor(sock)
    assert acceptor.address == sock.getsockname()
    assert repr(acceptor) == f"<Acceptor on 127.0.0.1:{sock.getsockname()[1]}>"
    acceptor.close()
    assert sock.fileno() == -1


@pytest.mark.parametrize("batch", [0, -1, True])
def test_batch_must_be_at_least_one(batch: int) -> None:
    """A batch that would accept nobody is refused, and the socket stays the caller's."""
    with ScriptedListener() as sock:
        with pytest.raises(ValueError, match="batch"):
            Acceptor(sock, batch=batch)
        assert sock.fileno() >= 0


async def test_takes_a_trio_socket_over() -> None:
    """On trio's kind of socket the acceptor works, exposes that very object, and closes it."""
    async with no_leaks():
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with Acceptor(listener.socket) as acceptor:
            assert acceptor.socket is listener.socket
            async with await trio.testing.open_stream_to_socket_listener(acceptor):
                await take(acceptor)
        assert listener.socket.fileno() == -1


async def test_has_a_trio_socket_for_looking() -> None:
    """`socket` is what trio's tools for socket listeners look at, on a standard socket, too."""
    async with accepting() as acceptor:
        assert acceptor.socket is acceptor.socket
        assert acceptor.socket.getsockname() == acceptor.address
        async with await trio.testing.open_stream_to_socket_listener(acceptor):
            await take(acceptor)


async def test_accepted_sockets_do_not_block() -> None:
    """An accepted socket never blocks the loop, and knows our end's address."""
    async with accepting() as acceptor, connect(acceptor.address):
        await acceptor.wait_acceptable()
        accepted = acceptor.accept_nowait()
        assert accepted is not None
        with accepted[0] as sock:
            with pytest.raises(BlockingIOError):
                sock.recv(1)
            assert acceptor.address_of(sock) == sock.getsockname()
        assert acceptor.accept_nowait() is None


async def test_our_address_on_every_interface() -> None:
    """On a wildcard address, our end is where the client really came in."""
    async with (
        accepting(lambda: socket.create_server(("0.0.0.0", 0))) as acceptor,
        connect(("127.0.0.9", acceptor.address[1])),
    ):
        await acceptor.wait_acceptable()
        accepted = acceptor.accept_nowait()
        assert accepted is not None
        with accepted[0]:
            assert acceptor.address_of(accepted[0]) == ("127.0.0.9", acceptor.address[1])


async def test_options_reach_accepted_sockets() -> None:
    """Where the platform does not copy options to accepted sockets, the acceptor sets them."""
    options = SocketOptions(keepalive=True, no_delay=True)
    async with no_leaks(), Acceptor(ScriptedListener(), socket_options=options) as acceptor:
        # As on a platform whose accepted sockets do not inherit.
        acceptor._options = options
        async with connect(acceptor.address), await acceptor.accept() as stream:
            assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


async def test_accept_keeps_no_delay_off() -> None:
    """A stream from accept() has the options that were asked for, not those that trio prefers."""
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
    async with (
        Acceptor(sock, socket_options=SocketOptions(no_delay=False)) as acceptor,
        connect(acceptor.address),
        await acceptor.accept() as stream,
    ):
        assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0


async def test_serve_listeners_takes_it() -> None:
    """Under plain trio.serve_listeners it serves, and is closed at the end."""

    async def handler(stream: trio.SocketStream) -> None:
        async for chunk in stream:
            await stream.send_all(chunk)

    async with no_leaks():
        acceptor = Acceptor(socket.create_server(("127.0.0.1", 0)))
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, handler, [acceptor])
            async with connect(acceptor.address) as a, connect(acceptor.address) as b:
                for client in (a, b):
                    await client.send_all(b"hello")
                    assert await client.receive_some() == b"hello"
            nursery.cancel_scope.cancel()
        with pytest.raises(trio.ClosedResourceError):
            await acceptor.accept()


@pytest.mark.parametrize("waiting", [False, True], ids=["nobody-waits-yet", "client-waits"])
async def test_cancelled_accept_loses_nobody(waiting: bool) -> None:
    """accept() cancelled at every point: the client is still there for the next call (F)."""
    outcomes = []
    async with accepting() as acceptor:
        for turns in [*range(12)] * 2:
            taken: list[SocketAddress] = []
            clients = [connect(acceptor.address)] if waiting else []

            async def come(clients: list[trio.SocketStream] = clients) -> None:
                for _ in range(3):
                    await trio.lowlevel.checkpoint()
                clients.append(connect(acceptor.address))

            async def accept(taken: list[SocketAddress] = taken) -> None:
                # No checkpoint after accept, for a cancellation there would be the test's own.
                stream = await acceptor.accept()
                taken.append(stream.socket.getpeername())
                stream.socket.close()

            async with trio.open_nursery() as nursery:
                if not waiting:
                    nursery.start_soon(come)
                outcomes.append(await cancelled_after(turns, accept))
            assert len(taken) != outcomes[-1]
            if not taken:
                with trio.fail_after(5):
                    taken.append(await take(acceptor))
            (client,) = clients
            assert taken == [client.socket.getsockname()]
            await client.aclose()
        assert acceptor.statistics().accepted == len(outcomes)
    assert set(outcomes) == {True, False}


# -- batches


class CountingAcceptor(Acceptor):
    """Counts the connections taken at each wake-up."""

    def __init__(self, sock: socket.socket, batch: int | None) -> None:
        super().__init__(sock, batch=batch)
        self.wake_ups: list[int] = []

    async def wait_acceptable(self) -> None:
        await super().wait_acceptable()
        self.wake_ups.append(0)

    def accept_nowait(self) -> tuple[socket.socket, SocketAddress] | None:
        accepted = super().accept_nowait()
        if accepted is not None:
            self.wake_ups[-1] += 1
        return accepted


@pytest.mark.parametrize("batch", [1, 7, None])
async def test_batch_bounds_each_wake_up(batch: int | None) -> None:
    """A server takes at most *batch* connections at one wake-up, or all with None."""
    async with no_leaks():
        acceptor = CountingAcceptor(ScriptedListener(), batch)
        clients = [connect(acceptor.address) for _ in range(40)]
        server = TcpServer(echo, listeners=[acceptor])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve)
            await until(lambda: len(server.connections) == 40)
            for client in clients:
                await client.aclose()
            nursery.cancel_scope.cancel()
        assert max(acceptor.wake_ups) == (batch or 40)


# -- every error of accept


@pytest.mark.parametrize("number", sorted(ACCEPT_PEER_ERRNOS), ids=name_of)
async def test_an_error_of_one_connection_is_skipped(number: int) -> None:
    """What befell a waiting connection concerns nobody else: the next one is taken at once."""
    async with accepting(failing(*[number] * 3)) as acceptor:
        async with connect(acceptor.address) as client:
            with trio.fail_after(5):
                assert await take(acceptor) == client.socket.getsockname()
        assert acceptor.statistics().errors == {name_of(number): 3}


async def test_many_dead_connections_let_others_run() -> None:
    """A thousand dead connections in a row are passed over in bounded turns (O)."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with (
        accepting(failing(*[errno.ECONNABORTED] * 1000)) as acceptor,
        connect(acceptor.address),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(others)
        with trio.fail_after(20):
            await take(acceptor)
        nursery.cancel_scope.cancel()
    assert turns >= 1000 // DEFAULT_BATCH - 1


@pytest.mark.parametrize("number", sorted(ACCEPT_MEMORY_ERRNOS), ids=name_of)
async def test_no_memory_pauses(number: int, autojump_clock: trio.testing.MockClock) -> None:
    """Without kernel memory it pauses, sheds nobody, and then takes who waits."""
    async with accepting(failing(*[number] * 3)) as acceptor:
        begun = trio.current_time()
        async with connect(acceptor.address) as client:
            assert await take(acceptor) == client.socket.getsockname()
        assert 0.2 < trio.current_time() - begun < 1
        statistics = acceptor.statistics()
        assert statistics.errors == {name_of(number): 3}
        assert statistics.shed == 0


@pytest.mark.parametrize("number", sorted(ACCEPT_DESCRIPTOR_ERRNOS), ids=name_of)
async def test_no_descriptors_sheds_and_pauses(
    number: int, autojump_clock: trio.testing.MockClock
) -> None:
    """Without descriptors those who wait are told, and after a pause the next ones are taken."""
    async with accepting(failing(number)) as acceptor:
        begun = trio.current_time()
        shed = [connect(acceptor.address) for _ in range(3)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take, acceptor)
            for client in shed:
                assert await client.receive_some() == b""
                await client.aclose()
            assert trio.current_time() == begun
            async with connect(acceptor.address):
                await until(lambda: acceptor.statistics().accepted)
        assert 0 < trio.current_time() - begun < 1
        statistics = acceptor.statistics()
        assert statistics.shed == 3
        assert statistics.errors == {name_of(number): 1}


@pytest.mark.parametrize(
    "number", sorted(ACCEPT_DESCRIPTOR_ERRNOS | ACCEPT_MEMORY_ERRNOS), ids=name_of
)
async def test_a_lasting_shortage_neither_spins_nor_floods_the_log(
    number: int, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten seconds of shortage: ten tries and one line a second, which counts them (S)."""
    async with no_leaks():
        sock = ScriptedListener()
        # Nobody is shed, for nobody can be accepted with the reserve, either.
        sock.failing = number
        async with Acceptor(sock) as acceptor, connect(acceptor.address):
            with trio.move_on_after(10.05):
                await take(acceptor)
            failed = acceptor.statistics().errors[name_of(number)]
            assert 50 <= failed <= 101
            # The reserve costs one more call each time.
            assert sock.accept_calls <= 2 * failed
            lines = [r.getMessage() for r in caplog.records if r.name == "trioreactor.acceptor"]
            assert 9 <= len(lines) <= 11
            counts = [int(n) for n in re.findall(r"failed (\d+) times", " ".join(lines))]
            assert len(counts) == len(lines)
            assert failed - 10 <= sum(counts) <= failed
            # And when it is over, service is back within a second.
            sock.failing = None
            with trio.fail_after(1):
                await take(acceptor)


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EIO])
async def test_any_other_error_surfaces(number: int) -> None:
    """An error of the listening socket itself comes out as it is, at once and once."""
    async with accepting(failing(number)) as acceptor, connect(acceptor.address):
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            await take(acceptor)
        assert caught.value.errno == number
        assert acceptor.statistics().errors == {name_of(number): 1}
        await take(acceptor)


async def test_an_accepted_connection_whose_options_fail_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection that died before its options could be set is closed; the next is taken (F)."""
    fails = [OSError(errno.EINVAL, "the connection is gone")]

    def apply(sock: socket.socket, options: SocketOptions) -> None:
        if fails:
            raise fails.pop()

    monkeypatch.setattr("trioreactor.acceptor.apply_to_connection", apply)
    async with accepting() as acceptor:
        acceptor._options = SocketOptions()
        async with connect(acceptor.address) as a, connect(acceptor.address) as b:
            assert await take(acceptor) == b.socket.getsockname()
            assert await a.receive_some() == b""


async def test_statistics_are_a_snapshot() -> None:
    """What statistics() gave does not change afterwards, and cannot be changed."""
    async with accepting(failing(errno.EPROTO)) as acceptor:
        before = acceptor.statistics()
        async with connect(acceptor.address):
            await take(acceptor)
        assert (before.accepted, before.errors) == (0, {})
        with pytest.raises(TypeError):
            before.errors["EPROTO"] = 2  # type: ignore[index]


async def test_serve_listeners_survives_a_shortage(caplog: pytest.LogCaptureFixture) -> None:
    """Under plain trio the shortage is the acceptor's own affair: trio sees no error."""
    served = trio.Event()

    async def handler(stream: trio.SocketStream) -> None:
        served.set()

    caplog.set_level(logging.ERROR)
    async with no_leaks():
        acceptor = Acceptor(ScriptedListener([errno.ENOBUFS, errno.ECONNABORTED, errno.ENFILE]))
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(trio.serve_listeners, handler, [acceptor]))
            with trio.fail_after(10):
                while not served.is_set():
                    async with connect(acceptor.address) as client:
                        await client.receive_some()
            nursery.cancel_scope.cancel()
    assert {r.name for r in caplog.records} == {"trioreactor.acceptor"}
