"""Lifecycle: each end has its one reason, and everybody is told whose doing it was."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.conftest import Pair, fill, no_leaks, tcp_pair, unix_pair
from tests.simulated import SimulatedSocket, simulated
from trioreactor import (
    CloseReason,
    ConnectionState,
    SendBufferFull,
    TcpConnection,
    Timeouts,
    Watermarks,
)

settled = trio.testing.wait_all_tasks_blocked

Situation = Callable[[TcpConnection, SimulatedSocket], Awaitable[None]]


async def _aclose(conn: TcpConnection, sock: SimulatedSocket) -> None:
    await conn.aclose()


async def _eof_then_aclose(conn: TcpConnection, sock: SimulatedSocket) -> None:
    sock.peer_ends()
    assert await conn.receive_some() == b""
    await conn.aclose()


async def _eof_unread_then_aclose(conn: TcpConnection, sock: SimulatedSocket) -> None:
    # Nobody had read the peer's EOF when we closed.
    sock.peer_ends()
    await settled()
    await conn.aclose()


async def _eof_after_aclose_began(conn: TcpConnection, sock: SimulatedSocket) -> None:
    sock.peer_sends(b"unread")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.aclose)
        await settled()
        sock.peer_ends()


async def _reset(conn: TcpConnection, sock: SimulatedSocket) -> None:
    sock.peer_resets()
    with pytest.raises(trio.BrokenResourceError):
        await conn.receive_some()


async def _reset_while_nobody_reads(conn: TcpConnection, sock: SimulatedSocket) -> None:
    sock.peer_resets()
    await conn.wait_closed()


async def _reset_met_by_send(conn: TcpConnection, sock: SimulatedSocket) -> None:
    sock.peer_resets()
    with pytest.raises(trio.BrokenResourceError):
        conn.send(b"x")


async def _reset_met_by_shutdown(conn: TcpConnection, sock: SimulatedSocket) -> None:
    sock.peer_resets()
    conn.shutdown()


async def _reset_then_aclose(conn: TcpConnection, sock: SimulatedSocket) -> None:
    sock.peer_sends(b"unread")
    sock.peer_resets()
    with pytest.raises(trio.BrokenResourceError):
        conn.send(b"x")
    assert conn.close_reason is None
    await conn.aclose()


async def _force_close(conn: TcpConnection, sock: SimulatedSocket) -> None:
    conn.force_close()


async def _force_close_for_a_reason(conn: TcpConnection, sock: SimulatedSocket) -> None:
    conn.force_close(CloseReason.IDLE_TIMEOUT, reset=True)


async def _force_close_after(conn: TcpConnection, sock: SimulatedSocket) -> None:
    conn.force_close_after(5)
    await conn.wait_closed()


async def _cancelled_aclose(conn: TcpConnection, sock: SimulatedSocket) -> None:
    with trio.move_on_after(0):
        await conn.aclose()


async def _torn_send(conn: TcpConnection, sock: SimulatedSocket) -> None:
    sock.room = 10
    with trio.move_on_after(1):
        await conn.send_all(bytes(100_000))


async def _stalled(conn: TcpConnection, sock: SimulatedSocket) -> None:
    sock.room = 10
    conn.send(bytes(100))
    await conn.wait_closed()


async def _stalled_aclose(conn: TcpConnection, sock: SimulatedSocket) -> None:
    sock.room = 10
    conn.send(bytes(100))
    await conn.aclose()


async def _too_much(conn: TcpConnection, sock: SimulatedSocket) -> None:
    sock.room = 10
    with pytest.raises(SendBufferFull):
        for _ in range(10):
            conn.send(bytes(1000))


async def _shutdown_and_no_answer(conn: TcpConnection, sock: SimulatedSocket) -> None:
    conn.shutdown()
    await conn.wait_closed()


async def _detach(conn: TcpConnection, sock: SimulatedSocket) -> None:
    conn._life.detach()


R = CloseReason
SITUATIONS: list[tuple[Situation, CloseReason]] = [
    (_aclose, R.LOCAL_CLOSE),
    (_eof_then_aclose, R.PEER_EOF),
    (_eof_unread_then_aclose, R.LOCAL_CLOSE),
    (_eof_after_aclose_began, R.LOCAL_CLOSE),
    (_reset, R.PEER_RESET),
    (_reset_while_nobody_reads, R.PEER_RESET),
    (_reset_met_by_send, R.PEER_RESET),
    (_reset_met_by_shutdown, R.PEER_RESET),
    (_reset_then_aclose, R.PEER_RESET),
    (_force_close, R.FORCED),
    (_force_close_for_a_reason, R.IDLE_TIMEOUT),
    (_force_close_after, R.FORCED),
    (_cancelled_aclose, R.CANCELLED),
    (_torn_send, R.CANCELLED),
    (_stalled, R.WRITE_STALLED),
    (_stalled_aclose, R.WRITE_STALLED),
    (_too_much, R.SLOW_CONSUMER),
    (_shutdown_and_no_answer, R.LOCAL_CLOSE),
    (_detach, R.LOCAL_CLOSE),
]


@pytest.mark.parametrize(
    ("situation", "reason"), SITUATIONS, ids=lambda x: getattr(x, "name", None)
)
async def test_each_end_has_its_reason(
    situation: Situation,
    reason: CloseReason,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The reason says what happened, stays, whoever closes again, and everybody is told (C)."""
    caplog.set_level(logging.DEBUG, "trioreactor.connection")
    conn, sock = simulated(
        watermarks=Watermarks(high=2000, low=100, limit=4096),
        timeouts=Timeouts(linger=2, write_stall=4),
    )
    told = trio.Event()

    async def wait() -> None:
        await conn.wait_closed()
        assert conn.close_reason is reason
        told.set()

    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await settled()
            await situation(conn, sock)
    assert told.is_set()
    assert conn.state is ConnectionState.DISCONNECTED
    # Only detach leaves the descriptor open, for whoever takes it.
    assert sock.closed is (situation is not _detach)
    for again in R:
        conn.force_close(again)
    conn.shutdown()
    await conn.aclose()
    await conn.wait_closed()
    assert conn.close_reason is reason
    # One step to the end, logged once.
    ends = [r for r in caplog.records if r.getMessage().endswith("-> DISCONNECTED")]
    assert len(ends) == 1
    assert conn.name in ends[0].getMessage()


async def all_refuse(conn: TcpConnection, error: type[Exception]) -> None:
    """Every use of *conn* raises *error*, exactly."""
    for use in (
        conn.receive_some,
        conn.__anext__,
        lambda: conn.dispatch(lambda conn, buffer: None),
        lambda: conn.send_all(b"x"),
        conn.wait_send_all_might_not_block,
        conn.wait_drained,
        conn.send_eof,
    ):
        with pytest.raises(error) as caught:
            await use()
        assert type(caught.value) is error
        assert conn.name in str(caught.value)
    with pytest.raises(error):
        conn.send(b"x")
    with pytest.raises(error):
        conn.detach()


@pytest.mark.parametrize("how", ["aclose", "force_close", "detach"])
async def test_after_our_close(how: str) -> None:
    """After a close of ours every use says that we closed."""
    left, right = await unix_pair(name="the one")
    if how == "aclose":
        await left.aclose()
    elif how == "force_close":
        left.force_close()
    else:
        stream, _ = left.detach()
        await stream.aclose()
    await all_refuse(left, trio.ClosedResourceError)
    right.force_close()


async def test_after_the_peers_reset() -> None:
    """On a broken connection every use says so, until we close it, and then that we did."""
    left, right = await tcp_pair(name="the one")
    right.force_close(reset=True)
    with pytest.raises(trio.BrokenResourceError) as caught:
        await left.receive_some()
    # What the kernel said is there for whoever wants to know.
    cause: BaseException | None = caught.value
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    assert isinstance(cause, ConnectionResetError)
    await all_refuse(left, trio.BrokenResourceError)
    await left.aclose()
    assert left.close_reason is CloseReason.PEER_RESET
    await all_refuse(left, trio.ClosedResourceError)


@pytest.mark.parametrize("reset", [False, True])
async def test_force_close_from_anywhere(
    make_pair: Callable[..., Awaitable[Pair]], reset: bool
) -> None:
    """It works again and again, and cancels the handler's scope each time (FAULTS 34)."""
    async with no_leaks():
        left, right = await make_pair()
        await fill(left)
        for _ in range(3):
            with trio.CancelScope() as scope:
                left.handler_scope = scope
                left.force_close(reset=reset)
                await trio.sleep_forever()
            assert scope.cancelled_caught
        assert left.statistics().buffered == 0
        right.force_close()


async def test_force_close_after(autojump_clock: MockClock) -> None:
    """It closes at its time; a later call takes an earlier one's place; a close forgets it."""
    left, right = await unix_pair()
    start = trio.current_time()
    left.force_close_after(1)
    left.force_close_after(5)
    right.force_close_after(1)
    right.force_close()
    await left.wait_closed()
    assert trio.current_time() == start + 5
    left.force_close_after(1)
    for seconds in (-1, float("nan")):
        with pytest.raises(ValueError, match="seconds"):
            left.force_close_after(seconds)


async def test_aclose_sends_what_is_queued() -> None:
    """What was sent before `aclose` arrives, though we have unread input (B, FAULTS 33)."""
    async with no_leaks():
        left, right = await tcp_pair()
        right.send(b"never read by us")
        size = await fill(left)
        got = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(left.aclose)
            while chunk := await right.receive_some():
                got += len(chunk)
            await right.aclose()
        assert got == size
        assert left.close_reason is CloseReason.LOCAL_CLOSE
        assert right.close_reason is CloseReason.PEER_EOF


async def test_detach() -> None:
    """The stream is handed over open, with what was read; not while something would be torn."""
    async with no_leaks():
        left, right = await unix_pair()
        left.send(b"for two")
        with trio.CancelScope() as scope:

            def on_message(conn: TcpConnection, buffer: object) -> None:
                with pytest.raises(trio.BusyResourceError):
                    conn.detach()
                scope.cancel()

            await right.dispatch(on_message)
        size = await fill(right)
        with pytest.raises(trio.BusyResourceError):
            right.detach()
        got = 0
        while got < size:
            got += len(await left.receive_some())
        await right.wait_drained()
        stream, rest = right.detach()
        assert rest == b"for two"
        assert right.close_reason is CloseReason.LOCAL_CLOSE
        left.send(b"more")
        assert await stream.receive_some() == b"more"
        await stream.aclose()
        left.force_close()
