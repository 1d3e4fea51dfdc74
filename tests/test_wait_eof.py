"""wait_eof and at_eof: hearing that the peer has gone, without reading."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from tests.conftest import Pair, fill, no_leaks, reset, serving, tcp_streams
from tests.simulated import simulated
from trioreactor import Buffer, CloseReason, ConnectionState, TcpConnection, TcpServer

MakePair = Callable[..., Awaitable[Pair]]

settled = trio.testing.wait_all_tasks_blocked

needs_epoll = pytest.mark.skipif(
    os.environ.get("TRIOREACTOR_POLLER") == "trio",
    reason="the trio poller watches only while something is waited for: it sees no such reset",
)


class Waiting:
    """A task in `wait_eof`, and whether it has returned."""

    def __init__(self, nursery: trio.Nursery, conn: TcpConnection) -> None:
        self.conn = conn
        self.scope = trio.CancelScope()
        self.returned = False
        self._over = trio.Event()
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        with self.scope:
            await self.conn.wait_eof()
            self.returned = True
        self._over.set()

    async def still(self) -> None:
        """It goes on waiting, however long."""
        await settled()
        await settled()
        assert not self.returned

    async def over(self) -> None:
        """It returns, within bounds."""
        with trio.fail_after(10):
            await self._over.wait()
        assert self.returned


def ignore(conn: TcpConnection, buffer: Buffer) -> None:
    """A message callback that leaves everything where it is."""


def take(conn: TcpConnection, buffer: Buffer) -> None:
    """One that takes everything and has no use for it."""
    buffer.take()


# -- the peer's EOF


async def test_eof_that_nobody_reads_is_seen(make_pair: MakePair) -> None:
    """With nothing unread it returns at the EOF, whether it waits then or asks later."""
    left, right = await make_pair()
    async with left, right, trio.open_nursery() as nursery:
        waiting = Waiting(nursery, right)
        await waiting.still()
        assert not right.at_eof
        await left.send_eof()
        await waiting.over()
        assert right.at_eof
        await Waiting(nursery, right).over()


async def test_eof_from_before_the_call(make_pair: MakePair) -> None:
    """An EOF that came before anybody asked is found."""
    left, right = await make_pair()
    async with left, right, trio.open_nursery() as nursery:
        await left.send_eof()
        await settled()
        await Waiting(nursery, right).over()
        assert right.at_eof


async def test_it_is_no_read(make_pair: MakePair) -> None:
    """A later `receive_some` gives the EOF again and again, and the connection can still send."""
    left, right = await make_pair()
    async with left, right, trio.open_nursery() as nursery:
        waiting = Waiting(nursery, right)
        await left.send_eof()
        await waiting.over()
        assert right.state is ConnectionState.CONNECTED
        assert [await right.receive_some() for _ in range(2)] == [b"", b""]
        await right.dispatch(ignore)
        await right.send_all(b"answer")
        assert await left.receive_some() == b"answer"
    assert right.close_reason is CloseReason.PEER_EOF


@pytest.mark.parametrize("max_bytes", [None, 5, 3])
async def test_unread_data_hides_it(make_pair: MakePair, max_bytes: int | None) -> None:
    """While data stands before the EOF it waits, until the last byte of that has been read."""
    left, right = await make_pair()
    async with left, right, trio.open_nursery() as nursery:
        waiting = Waiting(nursery, right)
        await left.send_all(b"hello")
        await waiting.still()
        await left.send_eof()
        await waiting.still()
        got = b""
        while len(got) < 5:
            await waiting.still()
            got += await right.receive_some(max_bytes)
        assert got == b"hello"
        await waiting.over()
        assert right.at_eof
        assert await right.receive_some() == b""


@pytest.mark.parametrize("max_bytes", [None, 3])
async def test_data_and_eof_at_once(make_pair: MakePair, max_bytes: int | None) -> None:
    """The same where both were there before anybody asked."""
    left, right = await make_pair()
    async with left, right, trio.open_nursery() as nursery:
        left.send(b"hello")
        left.shutdown()
        await settled()
        waiting = Waiting(nursery, right)
        got = b""
        while len(got) < 5:
            await waiting.still()
            got += await right.receive_some(max_bytes)
        await waiting.over()


async def test_data_that_was_read_before_the_eof_comes(make_pair: MakePair) -> None:
    """Data that came and was read is forgotten: the EOF after it is seen, round after round."""
    left, right = await make_pair()
    async with left, right, trio.open_nursery() as nursery:
        waiting = Waiting(nursery, right)
        for _ in range(3):
            await left.send_all(b"hello")
            await waiting.still()
            assert await right.receive_some() == b"hello"
            await waiting.still()
        await left.send_eof()
        await waiting.over()


# -- beside a reader


async def test_beside_receive_some(make_pair: MakePair) -> None:
    """While a task reads, both hear of the EOF; the reader loses nothing."""
    left, right = await make_pair()
    got = []

    async def read() -> None:
        got.append(await right.receive_some())
        got.append(await right.receive_some())

    async with left, right, trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await settled()
        waiting = Waiting(nursery, right)
        await left.send_all(b"hello")
        await waiting.still()
        await left.send_eof()
        await waiting.over()
    assert got == [b"hello", b""]


async def test_after_a_reader_was_cancelled(make_pair: MakePair) -> None:
    """That a reader which was there first gives up leaves nobody deaf."""
    left, right = await make_pair()
    async with left, right, trio.open_nursery() as nursery:
        with trio.CancelScope() as reading:
            nursery.start_soon(right.wait_eof)
            nursery.start_soon(settle_then, reading.cancel)
            await right.receive_some()
        waiting = Waiting(nursery, right)
        await waiting.still()
        await left.send_eof()
        await waiting.over()


async def settle_then(fn: Callable[[], object]) -> None:
    await settled()
    fn()


async def test_beside_dispatch(make_pair: MakePair) -> None:
    """While a dispatch runs, it and those who wait hear of the EOF."""
    left, right = await make_pair()
    async with left, right, trio.open_nursery() as nursery:
        nursery.start_soon(right.dispatch, take)
        await settled()
        waiting = Waiting(nursery, right)
        await left.send_all(b"hello")
        await waiting.still()
        await left.send_eof()
        await waiting.over()
    assert right.close_reason is CloseReason.PEER_EOF


@pytest.mark.parametrize("unread", [b"", b"hello"])
async def test_beside_a_paused_dispatch(make_pair: MakePair, unread: bytes) -> None:
    """A dispatch that is paused does not hide the EOF; what it left in the kernel does."""
    left, right = await make_pair()
    got = bytearray()
    async with left, right, trio.open_nursery() as nursery:
        ended = trio.Event()

        async def dispatch() -> None:
            await right.dispatch(lambda conn, buffer: got.extend(buffer.take()))
            ended.set()

        nursery.start_soon(dispatch)
        await settled()
        right.stop_reading()
        waiting = Waiting(nursery, right)
        left.send(unread)
        await left.send_eof()
        if unread:
            await waiting.still()
            right.start_reading()
        await waiting.over()
        right.start_reading()
        with trio.fail_after(10):
            await ended.wait()
        assert bytes(got) == unread


async def test_beside_a_paused_receive_some(make_pair: MakePair) -> None:
    """The same for a task in `receive_some`."""
    left, right = await make_pair()
    async with left, right, trio.open_nursery() as nursery:
        right.stop_reading()
        nursery.start_soon(right.receive_some)
        await settled()
        waiting = Waiting(nursery, right)
        await left.send_eof()
        await waiting.over()
        right.start_reading()


@pytest.mark.parametrize("waits_first", [True, False])
async def test_left_over_of_a_dispatch_hides_it_until_read(
    make_pair: MakePair, waits_first: bool
) -> None:
    """What a dispatch read and did not consume is unread, too: after it the EOF is seen."""
    left, right = await make_pair()
    async with left, right, trio.open_nursery() as nursery:
        await left.send_all(b"hello")
        with trio.CancelScope() as scope:
            nursery.start_soon(settle_then, scope.cancel)
            await right.dispatch(ignore)
        waiting = Waiting(nursery, right) if waits_first else None
        await left.send_eof()
        await settled()
        waiting = waiting or Waiting(nursery, right)
        await waiting.still()
        assert await right.receive_some(2) == b"he"
        await waiting.still()
        assert await right.receive_some() == b"llo"
        await waiting.over()


async def test_after_a_dispatch_that_raised(make_pair: MakePair) -> None:
    """A dispatch that its callback ended leaves those who wait hearing."""
    left, right = await make_pair()

    def fail(conn: TcpConnection, buffer: Buffer) -> None:
        buffer.take()
        raise KeyError

    async with left, right, trio.open_nursery() as nursery:
        await left.send_all(b"hello")
        waiting = Waiting(nursery, right)
        with pytest.raises(KeyError):
            await right.dispatch(fail)
        await waiting.still()
        await left.send_eof()
        await waiting.over()


# -- the other ends


@needs_epoll
@pytest.mark.parametrize("unread", [b"", b"hello"])
async def test_reset_that_nobody_reads(unread: bytes) -> None:
    """A reset ends the wait and the connection; with data before it once that has been read."""
    theirs, stream = await tcp_streams()
    async with TcpConnection(stream) as right, trio.open_nursery() as nursery:
        waiting = Waiting(nursery, right)
        if unread:
            await theirs.send_all(unread)
            await waiting.still()
        reset(theirs.socket)
        if unread:
            await waiting.still()
            assert await right.receive_some() == unread
        await waiting.over()
        assert right.close_reason is CloseReason.PEER_RESET
        assert not right.at_eof


async def test_reset_found_by_a_reader() -> None:
    """On every poller a reset that a reader meets ends the wait."""
    theirs, stream = await tcp_streams()
    async with TcpConnection(stream) as right, trio.open_nursery() as nursery:
        waiting = Waiting(nursery, right)
        await waiting.still()
        reset(theirs.socket)
        with pytest.raises(trio.BrokenResourceError):
            await right.receive_some()
        await waiting.over()
        assert right.close_reason is CloseReason.PEER_RESET


@pytest.mark.parametrize("asked", ["before", "after"])
async def test_broken_by_a_send(asked: str) -> None:
    """A send that finds the connection broken ends the wait; what came before stays readable."""
    theirs, stream = await tcp_streams()
    async with TcpConnection(stream) as right, trio.open_nursery() as nursery:
        waiting = Waiting(nursery, right) if asked == "before" else None
        await theirs.send_all(b"hello")
        await settled()
        reset(theirs.socket)
        await settled()
        assert waiting is None or not waiting.returned
        with pytest.raises(trio.BrokenResourceError):
            right.send(b"x")
        waiting = waiting or Waiting(nursery, right)
        await waiting.over()
        assert not right.at_eof
        assert await right.receive_some() == b"hello"
        with pytest.raises(trio.BrokenResourceError):
            await right.receive_some()
        assert right.close_reason is CloseReason.PEER_RESET


async def _aclose(conn: TcpConnection) -> None:
    await conn.aclose()


async def _aclose_that_flushes(conn: TcpConnection) -> None:
    await fill(conn)
    await conn.aclose()


async def _force_close(conn: TcpConnection) -> None:
    conn.force_close()


async def _detach(conn: TcpConnection) -> None:
    stream, _ = conn.detach()
    await stream.aclose()


@pytest.mark.parametrize("end", [_aclose, _aclose_that_flushes, _force_close, _detach])
async def test_our_own_end(
    make_pair: MakePair, end: Callable[[TcpConnection], Awaitable[object]]
) -> None:
    """Every way to end it ourselves ends the wait, also of one who asks afterwards."""
    async with no_leaks():
        left, right = await make_pair()
        async with left, right, trio.open_nursery() as nursery:
            waiting = Waiting(nursery, right)
            await waiting.still()
            nursery.start_soon(end, right)
            # An `aclose` that flushes has not ended yet: its own waiters hear of it at once.
            await settled()
            assert waiting.returned
            await Waiting(nursery, right).over()
            nursery.start_soon(read_out, left)


async def test_asked_while_it_closes(make_pair: MakePair) -> None:
    """One who asks first while an `aclose` still flushes has nothing to wait for."""
    left, right = await make_pair()
    async with left, right, trio.open_nursery() as nursery:
        nursery.start_soon(_aclose_that_flushes, right)
        await settled()
        assert right.state is not ConnectionState.DISCONNECTED
        await Waiting(nursery, right).over()
        assert right.state is not ConnectionState.DISCONNECTED
        nursery.start_soon(read_out, left)


async def read_out(conn: TcpConnection) -> None:
    async for _ in conn:
        pass


async def test_shutdown_is_no_end(make_pair: MakePair) -> None:
    """Our own half-close ends nothing: the peer may go on sending."""
    left, right = await make_pair()
    async with left, right, trio.open_nursery() as nursery:
        right.shutdown()
        waiting = Waiting(nursery, right)
        await waiting.still()
        await left.send_eof()
        await waiting.over()


# -- those who wait


async def test_many_may_wait_and_give_up(make_pair: MakePair) -> None:
    """Any number of tasks; that one is cancelled changes nothing for the others."""
    left, right = await make_pair()
    async with left, right, trio.open_nursery() as nursery:
        waiting = [Waiting(nursery, right) for _ in range(3)]
        await waiting[0].still()
        waiting[0].scope.cancel()
        await waiting[1].still()
        assert right.state is ConnectionState.CONNECTED
        await left.send_eof()
        await waiting[1].over()
        await waiting[2].over()
        assert not waiting[0].returned


async def test_giving_up_changes_nothing(make_pair: MakePair) -> None:
    """With nobody left who waits, reading and writing go on as if nobody had."""
    left, right = await make_pair()
    async with left, right:
        for _ in range(3):
            with trio.move_on_after(0):
                await right.wait_eof()
            await left.send_all(b"hello")
            assert await right.receive_some() == b"hello"
        await left.send_eof()
        assert await right.receive_some() == b""


async def test_it_checkpoints(make_pair: MakePair) -> None:
    """It is a checkpoint also where it need not wait."""
    left, right = await make_pair()
    async with left, right:
        await left.aclose()
        with trio.testing.assert_checkpoints():
            await right.wait_eof()
        with trio.testing.assert_checkpoints():
            await right.wait_eof()
        await right.aclose()
        with trio.testing.assert_checkpoints():
            await right.wait_eof()
        with trio.CancelScope() as scope:
            scope.cancel()
            await right.wait_eof()
        assert scope.cancelled_caught


async def test_spurious_events_are_no_end() -> None:
    """An event with nothing behind it, even one that speaks of an error, ends nothing."""
    conn, sock = simulated()
    async with conn, trio.open_nursery() as nursery:
        waiting = Waiting(nursery, conn)
        await waiting.still()
        for failed in (False, True):
            sock._poller.happen(sock.fileno(), readable=True, hangup=failed, failed=failed)
            await waiting.still()
        assert conn.state is ConnectionState.CONNECTED
        sock.peer_ends()
        await waiting.over()
        assert conn.at_eof


async def test_an_eof_with_an_error_that_is_none() -> None:
    """Where the kernel speaks of an error and has none, the EOF behind it is a clean one."""
    conn, sock = simulated()
    async with conn, trio.open_nursery() as nursery:
        waiting = Waiting(nursery, conn)
        await waiting.still()
        sock.eof = True
        sock._poller.happen(sock.fileno(), readable=True, hangup=True, failed=True)
        await waiting.over()
        assert conn.at_eof
        assert not conn.broken


async def test_work_for_a_peer_that_has_gone_is_cancelled() -> None:
    """In a server's handler: work beside `wait_eof` is cancelled when the client goes."""
    worked = []

    async def handler(conn: TcpConnection) -> None:
        request = await conn.receive_some()
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await conn.wait_eof()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            try:
                await trio.sleep_forever()
            finally:
                worked.append(request)

    server = TcpServer(handler, 0, host="127.0.0.1")
    async with serving(server) as address:
        client = await trio.open_tcp_stream(*address)
        await client.send_all(b"a long question")
        await settled()
        assert len(server.connections) == 1
        assert not worked
        await client.aclose()
        with trio.fail_after(10):
            while server.connections:
                await trio.lowlevel.checkpoint()
    assert worked == [b"a long question"]
    assert server.statistics().closed == {CloseReason.PEER_EOF: 1}


async def test_a_connection_in_use_has_no_trace_of_it(make_pair: MakePair) -> None:
    """After a wait that was given up, much data goes through whole, both read and dispatched."""
    left, right = await make_pair()
    sent = bytes(range(256)) * 4096
    got = bytearray()
    async with left, right, trio.open_nursery() as nursery:
        with trio.move_on_after(0):
            await right.wait_eof()

        async def send() -> None:
            await left.send_all(sent)
            await left.send_eof()

        nursery.start_soon(send)
        while len(got) < len(sent) // 2:
            got += await right.receive_some(5000)
        await right.dispatch(lambda conn, buffer: got.extend(buffer.take()))
        await right.wait_eof()
    assert bytes(got) == sent
