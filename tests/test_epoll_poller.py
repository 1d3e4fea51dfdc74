"""EpollPoller: edges are not lost, and events of former owners do no harm."""

from __future__ import annotations

import os
import select
import socket

import pytest
import trio
import trio.testing

from tests.conftest import fill, no_leaks, tcp_pair, unix_pair, until
from trioreactor import CloseReason, TcpConnection
from trioreactor.buffer import Buffer
from trioreactor.default_poller import current_poller
from trioreactor.epoll_poller import HAVE_EPOLL, EpollPoller
from trioreactor.poller import current

pytestmark = pytest.mark.skipif(not HAVE_EPOLL, reason="this platform has no epoll")

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture(autouse=True)
def epoll(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about this poller, whatever the environment says."""
    monkeypatch.setenv("TRIOREACTOR_POLLER", "epoll")


async def test_a_descriptor_is_registered_once() -> None:
    """Neither reading, pausing nor writing tells the kernel anything about the descriptor."""
    calls: list[str] = []

    class Counting:
        """An epoll object that counts."""

        def __init__(self, epoll: select.epoll) -> None:
            self._epoll = epoll

        def register(self, fd: int, mask: int) -> None:
            calls.append("register")
            self._epoll.register(fd, mask)

        def modify(self, fd: int, mask: int) -> None:
            calls.append("modify")

        def __getattr__(self, name: str) -> object:
            return getattr(self._epoll, name)

    left, right = await unix_pair()
    poller = current_poller()
    assert isinstance(poller, EpollPoller)
    poller._epoll = Counting(poller._epoll)  # type: ignore[assignment]
    a, b = await unix_pair()
    for _ in range(20):
        a.send(b"x")
        assert await b.receive_some() == b"x"
        b.stop_reading()
        b.start_reading()
    await fill(a)
    await settled()
    while a.statistics().buffered:
        await b.receive_some()
    assert calls == ["register"] * 2
    for conn in (a, b, left, right):
        conn.force_close()


async def test_a_fin_after_a_short_read() -> None:
    """A FIN that comes after the data was read is an event of its own."""
    left, right = await tcp_pair()
    got: list[bytes] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(right.dispatch, lambda conn, buffer: got.append(buffer.take()))
        await settled()
        left.send(b"data")
        await until(lambda: got)
        await settled(0.01)
        assert not right._read.eof
        left.shutdown()
        with trio.fail_after(10):
            await until(lambda: right._read.eof)
    assert got == [b"data"]
    left.force_close()
    right.force_close()


@pytest.mark.parametrize("mode", ["coroutine", "dispatch"])
async def test_data_and_reset_together(mode: str) -> None:
    """Of data and a reset that are found together, the data comes first."""
    left, right = await tcp_pair()
    got = bytearray()
    left.send(b"data")
    left.force_close(reset=True)
    await settled(0.01)
    with pytest.raises(trio.BrokenResourceError):
        if mode == "coroutine":
            async for chunk in right:
                got += chunk
        else:
            await right.dispatch(lambda conn, buffer: got.extend(buffer.take()))
    assert got == b"data"
    assert right.close_reason is CloseReason.PEER_RESET


async def test_an_edge_after_a_short_write() -> None:
    """After the kernel was full, its next room is used, with nothing asked for again."""
    left, right = await tcp_pair()
    size = 20_000_000
    left.send(bytes(size))
    assert left.statistics().buffered
    got = 0
    with trio.fail_after(20):
        while got < size:
            got += len(await right.receive_some())
    await until(lambda: not left.statistics().buffered)
    left.force_close()
    right.force_close()


async def test_a_number_taken_again_in_the_same_batch() -> None:
    """Events of a connection that another one's callback closed do not hurt the connection that
    got its number: it neither ends nor misses anything.
    """
    async with no_leaks():
        first_left, first = await unix_pair()
        victim_left, victim = await unix_pair()
        poller = current_poller()
        assert isinstance(poller, EpollPoller)
        number = victim._sock.fileno()
        successors: list[tuple[TcpConnection, TcpConnection]] = []

        def on_message(conn: TcpConnection, buffer: Buffer) -> None:
            buffer.take()
            victim.force_close()
            ours, theirs = socket.socketpair()
            # The kernel gives the lowest free number; make sure that it is the victim's.
            if theirs.fileno() == number:
                ours, theirs = theirs, ours
            if ours.fileno() != number:
                os.dup2(ours.fileno(), number)
                ours.close()
            else:
                ours.detach()
            pair = []
            for sock in (socket.socket(fileno=number), theirs):
                sock.setblocking(False)
                pair.append(TcpConnection.from_socket(sock, local_address="", peer_address=""))
            successors.append((pair[0], pair[1]))

        class Batch:
            """An epoll object whose next answer is known."""

            def __init__(self, epoll: select.epoll) -> None:
                self._epoll = epoll

            def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
                self._epoll.poll(0, most)
                poller._epoll = self._epoll  # type: ignore[union-attr]
                everything = (
                    select.EPOLLIN
                    | select.EPOLLOUT
                    | select.EPOLLERR
                    | select.EPOLLHUP
                    | select.EPOLLRDHUP
                )
                return [(first._sock.fileno(), select.EPOLLIN), (number, everything)]

            def __getattr__(self, name: str) -> object:
                return getattr(self._epoll, name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.dispatch, on_message)
            await settled()
            poller._epoll = Batch(poller._epoll)  # type: ignore[assignment]
            first_left.send(b"x")
            await until(lambda: successors)
            ((heir, heir_left),) = successors
            assert heir._sock.fileno() == number
            await settled()
            assert heir.close_reason is None
            for word in (b"one", b"two"):
                heir_left.send(word)
                with trio.fail_after(10):
                    assert await heir.receive_some() == word
            heir.send(b"back")
            assert await heir_left.receive_some() == b"back"
            got: list[bytes] = []
            nursery.start_soon(heir.dispatch, lambda conn, buffer: got.append(buffer.take()))
            await settled()
            heir_left.send(b"three")
            await until(lambda: got)
            for conn in (first, first_left, victim_left, heir, heir_left):
                conn.force_close()
        assert got == [b"three"]
        assert current.get() is None


class Turns(trio.abc.Instrument):
    """In which turn of trio's loop each task runs."""

    def __init__(self) -> None:
        self.turn = 0
        self.ran: list[tuple[int, str]] = []

    def after_io_wait(self, timeout: float) -> None:
        self.turn += 1

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.ran.append((self.turn, task.name))


async def test_who_waits_for_input_runs_at_once() -> None:
    """A task that waits for input runs in the turn of the loop in which its input is found, with
    the poller's own, and not in the next.
    """
    left, right = socket.socketpair()
    other_left, other = await unix_pair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(right))
    async with TcpConnection(stream) as conn, trio.open_nursery() as nursery:
        nursery.start_soon(other.dispatch, lambda conn, buffer: buffer.take())

        async def read() -> None:
            for _ in range(20):
                assert await conn.receive_some() == b"x"

        nursery.start_soon(read, name="reader")
        await settled()
        turns = Turns()
        trio.lowlevel.add_instrument(turns)
        for _ in range(20):
            turns.ran.clear()
            left.send(b"x")
            other_left.send(b"for a callback")
            await settled()
            first = {name: turn for turn, name in reversed(turns.ran)}
            assert first["reader"] == first["trioreactor.EpollPoller"]
        trio.lowlevel.remove_instrument(turns)
        other.force_close()
    left.close()
    other_left.force_close()


async def test_an_end_and_a_write_beside_a_task_that_waits() -> None:
    """What is not only input reaches a connection whose task waits, too."""
    left, right = await tcp_pair()
    left.send(bytes(20_000_000))
    got = 0
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def wait() -> None:
            # Parked for input, it is told of room for output.
            with pytest.raises(trio.BrokenResourceError):
                await left.receive_some()

        while got < 20_000_000:
            got += len(await right.receive_some())
        right.force_close(reset=True)
    assert left.close_reason is CloseReason.PEER_RESET


async def test_a_wake_up_from_a_burst_of_calls() -> None:
    """Many calls while it sleeps are all made, and it sleeps again after."""
    left, right = await unix_pair()
    poller = current_poller()
    calls: list[int] = []
    for _ in range(20):
        await settled()
        calls.clear()
        for n in range(100):
            poller.call_soon(lambda n=n: calls.append(n))
        await settled()
        assert calls == list(range(100))
    left.force_close()
    right.force_close()


async def test_a_number_taken_again_before_its_events_are_handled() -> None:
    """Events that were found beside a wake-up are not those of a new owner of the descriptor."""
    closing, theirs = await unix_pair()
    waiting, other = await unix_pair()
    spare, spares = socket.socketpair()
    taken: list[TcpConnection] = []

    async def take_its_number() -> None:
        await waiting.receive_some()
        number = closing._sock.fileno()
        closing.force_close()
        sock = spare.dup()
        assert sock.fileno() == number
        sock.setblocking(False)
        taken.append(TcpConnection.from_socket(sock, local_address="", peer_address=""))

    with spare, spares:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_its_number)
            await settled()
            # Both are found at once.
            theirs._sock.shutdown(socket.SHUT_WR)
            other.send(b"go")
        (conn,) = taken
        assert not conn.peer_closed
        assert not conn._read.channel.readable
        for one in (conn, theirs, waiting, other):
            one.force_close()
